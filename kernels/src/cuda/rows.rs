//! Rows in device memory: of f32 values, and as the planes of bf16 that products take.

use half::bf16;

use super::buffer::Slice;

/// Columns of a row that belong together in [`Order::Nibble`].
const NIBBLE_COLUMNS: usize = 32;

/// In which order a product wants the columns of its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Ascending: bf16 and FP8 weights.
    Natural,
    /// As 4-bit codes are taken out of their words, columns j and j + 4 together: INT4 and MXFP4 weights.
    Nibble,
}

impl Order {
    /// Where column `column` lies.
    pub fn position(self, column: usize) -> usize {
        match self {
            Self::Natural => column,
            Self::Nibble => {
                let (word, nibble) = (column % NIBBLE_COLUMNS / 8, column % 8);
                column / NIBBLE_COLUMNS * NIBBLE_COLUMNS + nibble % 4 * 8 + 2 * word + nibble / 4
            }
        }
    }
}

/// f32 rows, the first of which starts where the slice does.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    /// From the first value of the first row to the last of the last, at least.
    pub values: Slice<'a, f32>,
    /// Values from one row to the next.
    pub stride: usize,
}

impl<'a> Strided<'a> {
    /// Rows `stride` values apart.
    pub fn new(values: impl Into<Slice<'a, f32>>, stride: usize) -> Self {
        Self { values: values.into(), stride }
    }

    /// That `rows` rows of `width` values are there.
    #[track_caller]
    pub(super) fn check(&self, rows: usize, width: usize, what: &str) {
        assert!(width <= self.stride || rows <= 1, "{what}: rows of {width} values, {} apart", self.stride);
        let wanted = rows.saturating_sub(1) * self.stride + width;
        assert!(rows == 0 || wanted <= self.values.len(), "{what}: {wanted} values of {}", self.values.len());
    }
}

/// `[count, rows, width]` bf16 values that, added up over the planes, are `[rows, width]` f32 values: each plane
/// holds what those before it left, rounded. One plane is bf16 precision, three are the 24 bits of f32.
#[derive(Clone, Copy)]
pub struct Planes<'a> {
    /// Aligned to 16 bytes.
    pub values: Slice<'a, bf16>,
    /// Number of planes.
    pub count: usize,
    /// Values from one plane to the next.
    pub stride: usize,
}

impl<'a> Planes<'a> {
    /// `count` planes that share `values` equally.
    pub fn new(values: impl Into<Slice<'a, bf16>>, count: usize) -> Self {
        let values = values.into();
        assert!(count > 0 && values.len().is_multiple_of(count), "{count} planes of {} values", values.len());
        Self { values, count, stride: values.len() / count }
    }

    /// That the planes hold `rows` rows of `width` values, which have this order.
    #[track_caller]
    pub(super) fn check(&self, rows: usize, width: usize, order: Order, what: &str) {
        let one = rows * width;
        assert!(one <= self.stride, "{what}: {one} values in planes {} apart", self.stride);
        let wanted = (self.count - 1) * self.stride + one;
        assert!(wanted <= self.values.len(), "{what}: {wanted} values of {}", self.values.len());
        if order == Order::Nibble {
            assert!(width.is_multiple_of(NIBBLE_COLUMNS), "{what}: {width} columns in nibble order");
        }
        let aligned = self.values.address().is_multiple_of(16) && (self.stride * 2).is_multiple_of(16);
        assert!(aligned || !width.is_multiple_of(8), "{what}: planes that are not aligned to 16 bytes");
    }
}

/// What a kernel that writes planes in either order or both is told.
pub(super) struct PlaneArguments<'a> {
    pub natural: Option<Slice<'a, bf16>>,
    pub nibble: Option<Slice<'a, bf16>>,
    pub stride: u64,
    pub count: u32,
}

impl<'a> PlaneArguments<'a> {
    /// Checks both.
    #[track_caller]
    pub fn new(
        natural: Option<Planes<'a>>,
        nibble: Option<Planes<'a>>,
        (rows, width): (usize, usize),
        what: &str,
    ) -> Self {
        for (planes, order) in [(natural, Order::Natural), (nibble, Order::Nibble)] {
            if let Some(planes) = planes {
                planes.check(rows, width, order, what);
            }
        }
        if let (Some(a), Some(b)) = (natural, nibble) {
            assert_eq!((a.count, a.stride), (b.count, b.stride), "{what}: planes of both orders");
        }
        let (count, stride) = natural.or(nibble).map_or((0, 0), |planes| (planes.count, planes.stride));
        Self {
            natural: natural.map(|planes| planes.values),
            nibble: nibble.map(|planes| planes.values),
            stride: stride as u64,
            count: count as u32,
        }
    }
}

/// A number of rows, columns or heads as kernels take it.
#[track_caller]
pub(super) fn count(value: usize) -> u32 {
    u32::try_from(value).expect("a size of less than 2^32")
}

#[cfg(test)]
mod tests {
    use super::Order;

    #[test]
    fn nibble_order_pairs_columns_of_a_word() {
        let positions: Vec<usize> = (0..64).map(|column| Order::Nibble.position(column)).collect();
        let mut sorted = positions.clone();
        sorted.sort();
        assert_eq!(sorted, (0..64).collect::<Vec<_>>());
        for column in (0..64).filter(|column| column % 8 < 4) {
            assert_eq!(positions[column] + 1, positions[column + 4]);
            assert!(positions[column].is_multiple_of(2));
        }
        assert_eq!(positions[..10], [0, 8, 16, 24, 1, 9, 17, 25, 2, 10]);
    }
}
