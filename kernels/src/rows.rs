//! Rows of f32 inside a larger buffer, as every operation takes and gives them.
//!
//! [`RowsMut`] can be cut by columns as well as by rows, so threads that compute different output
//! columns of the same rows each own their part. It holds the only `unsafe` outside [`crate::simd`].

use std::marker::PhantomData;

/// `count` rows of `width` values, `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    count: usize,
    stride: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    /// Rows that follow one another without a gap.
    ///
    /// # Panics
    /// If `data` is not whole rows of `width`.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        Self::strided(data, whole_rows(data.len(), width), width, width)
    }

    /// `count` rows of `width` values whose first values are `stride` apart. The last row need not
    /// be followed by a gap.
    ///
    /// # Panics
    /// If the rows do not lie in `data`, or overlap.
    pub fn strided(data: &'a [f32], count: usize, stride: usize, width: usize) -> Self {
        check(data.len(), count, stride, width);
        Self { data, count, stride, width }
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `index`.
    #[inline]
    pub fn row(&self, index: usize) -> &'a [f32] {
        assert!(index < self.count, "row {index} of {}", self.count);
        &self.data[index * self.stride..][..self.width]
    }

    /// Columns `start .. start + width` of every row, such as one head.
    ///
    /// # Panics
    /// If they do not lie in a row.
    pub fn columns(&self, start: usize, width: usize) -> Self {
        assert!(start + width <= self.width, "columns {start}+{width} of {}", self.width);
        let start = if self.count == 0 { 0 } else { start };
        Self { data: &self.data[start..], width, ..*self }
    }

    /// Rows `start .. start + count`.
    ///
    /// # Panics
    /// If there are not that many.
    pub fn slice(&self, start: usize, count: usize) -> Self {
        assert!(start + count <= self.count, "rows {start}+{count} of {}", self.count);
        let start = if count == 0 { 0 } else { start };
        Self { data: &self.data[start * self.stride..], count, ..*self }
    }
}

/// `count` rows of `width` values, `stride` values apart, borrowed alone. The gaps between rows may
/// belong to another `RowsMut`.
#[derive(Debug)]
pub struct RowsMut<'a> {
    start: *mut f32,
    count: usize,
    stride: usize,
    width: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `RowsMut` is an exclusive borrow of its values and of nothing else, as `&mut [f32]` is.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: a shared `RowsMut` gives no access to its values.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// Rows that follow one another without a gap.
    ///
    /// # Panics
    /// If `data` is not whole rows of `width`.
    pub fn new(data: &'a mut [f32], width: usize) -> Self {
        let count = whole_rows(data.len(), width);
        Self::strided(data, count, width, width)
    }

    /// `count` rows of `width` values whose first values are `stride` apart. The last row need not
    /// be followed by a gap.
    ///
    /// # Panics
    /// If the rows do not lie in `data`, or overlap.
    pub fn strided(data: &'a mut [f32], count: usize, stride: usize, width: usize) -> Self {
        check(data.len(), count, stride, width);
        Self { start: data.as_mut_ptr(), count, stride, width, borrow: PhantomData }
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `index`.
    #[inline]
    pub fn row(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.count, "row {index} of {}", self.count);
        // SAFETY: the constructor checked that row `index < count` lies in the borrowed buffer; cuts
        // only ever shrink count and width. No other `RowsMut` covers these columns of these rows
        // (cuts are disjoint and consume their parent), and `&mut self` keeps this one from giving
        // the row twice.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.stride), self.width) }
    }

    /// The same rows, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut { borrow: PhantomData, ..*self }
    }

    /// The rows before `at`, and those from `at` on.
    ///
    /// # Panics
    /// If there are fewer than `at` rows.
    pub fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at <= self.count, "cut at row {at} of {}", self.count);
        // `wrapping_add`: with no row left the start may lie past the buffer, and is never read.
        let start = self.start.wrapping_add(at * self.stride);
        (Self { count: at, ..self }, Self { start, count: self.count - at, ..self })
    }

    /// The columns before `at`, and those from `at` on, of every row.
    ///
    /// # Panics
    /// If rows are narrower than `at`.
    pub fn split_columns(self, at: usize) -> (Self, Self) {
        assert!(at <= self.width, "cut at column {at} of {}", self.width);
        let start = self.start.wrapping_add(at);
        (Self { width: at, ..self }, Self { start, width: self.width - at, ..self })
    }

    /// Columns `start .. start + width` of every row, such as one head.
    ///
    /// # Panics
    /// If they do not lie in a row.
    pub fn columns(self, start: usize, width: usize) -> Self {
        self.split_columns(start).1.split_columns(width).0
    }

    /// Rows `start .. start + count`.
    ///
    /// # Panics
    /// If there are not that many.
    pub fn slice(self, start: usize, count: usize) -> Self {
        self.split_rows(start).1.split_rows(count).0
    }
}

/// `out[i] += x[i]`: a residual or a shared expert.
///
/// # Panics
/// If the lengths differ.
pub fn add(out: &mut [f32], x: &[f32]) {
    assert_eq!(out.len(), x.len(), "lengths to add");
    for (o, x) in out.iter_mut().zip(x) {
        *o += x;
    }
}

fn whole_rows(len: usize, width: usize) -> usize {
    assert!(width > 0 && len.is_multiple_of(width), "{len} values are not whole rows of {width}");
    len / width
}

fn check(len: usize, count: usize, stride: usize, width: usize) {
    assert!(count <= 1 || width <= stride, "rows of {width}, {stride} apart, overlap");
    let needed = count.checked_sub(1).map_or(Some(0), |last| last.checked_mul(stride)?.checked_add(width));
    assert!(
        needed.is_some_and(|n| n <= len),
        "{count} rows of {width}, {stride} apart, in a buffer of {len} values"
    );
}
