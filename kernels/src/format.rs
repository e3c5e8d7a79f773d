//! How the values of a weight are stored, byte by byte as published.
//!
//! A [`Matrix`] borrows mapped bytes; nothing here copies or converts a weight as a whole.
//! Alignment is never assumed: a published file promises none.

/// Rows and columns of one FP8 scale block.
pub const FP8_BLOCK: usize = 128;
/// Columns that share one INT4 or MXFP4 scale.
pub const GROUP: usize = 32;

/// The stored values of a row-major matrix `[rows, cols]`, little endian.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// 4 bytes per value.
    F32(&'a [u8]),
    /// 2 bytes per value, IEEE half.
    F16(&'a [u8]),
    /// 2 bytes per value, the upper half of an f32.
    Bf16(&'a [u8]),
    /// e4m3fn bytes (`0x7f`, `0xff` are NaN) times an f32 per block of 128 x 128; edge blocks are
    /// partial. `scales` is `[ceil(rows/128), ceil(cols/128)]`.
    Fp8 {
        /// One byte per value.
        values: &'a [u8],
        /// f32, little endian.
        scales: &'a [u8],
    },
    /// Nibbles (low = even column, stored as `q + 8`) times a bf16 scale per 32 columns of a row.
    Int4 {
        /// `[rows, cols/2]`.
        packed: &'a [u8],
        /// bf16 `[rows, cols/32]`.
        scales: &'a [u8],
    },
    /// e2m1 nibbles (low = even column) times `2^(s-127)` per 32 columns of a row; `s = 255` is NaN.
    Mxfp4 {
        /// `[rows, cols/2]`.
        blocks: &'a [u8],
        /// One byte per group, `[rows, cols/32]`.
        scales: &'a [u8],
    },
    /// Bytes (`q + 128`) times a bf16 scale per 32 columns of a row: no published format, but what the
    /// option for 8-bit copies of float weights makes ([`crate::quantised::to_q8`]).
    Q8 {
        /// `[rows, cols]`.
        codes: &'a [u8],
        /// bf16 `[rows, cols/32]`.
        scales: &'a [u8],
    },
}

/// A borrowed matrix of `rows` rows, each of `cols` values, that begins at row `first_row` of the
/// stored values (a slice of rows of a larger weight, such as one expert or one head).
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Stored values, from the first row of the whole weight.
    pub values: Values<'a>,
    /// First stored row of this view.
    pub first_row: usize,
    /// Rows of this view.
    pub rows: usize,
    /// Columns, equal for the view and the stored weight.
    pub cols: usize,
}

impl<'a> Matrix<'a> {
    /// A view of the whole weight.
    pub fn new(values: Values<'a>, rows: usize, cols: usize) -> Self {
        Self { values, first_row: 0, rows, cols }
    }

    /// Rows `start .. start + rows` of this view.
    ///
    /// # Panics
    /// If they do not lie within the view.
    pub fn slice(&self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows, "rows {start}+{rows} of {}", self.rows);
        Self { first_row: self.first_row + start, rows, ..*self }
    }
}
