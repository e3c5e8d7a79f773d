//! Rows of f32 inside a larger buffer, as every operation takes and gives them.
//!
//! [`RowsMut`] can be cut by columns as well as by rows, so threads that compute different output
//! columns of the same rows each own their part; `for_each_part` hands such parts out to the threads.

use std::marker::PhantomData;

use crate::team;

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
pub struct RowsMut<'a, T = f32> {
    start: *mut T,
    count: usize,
    stride: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a `RowsMut` is an exclusive borrow of its values and of nothing else, as `&mut [T]` is.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: a shared `RowsMut` gives no access to its values.
unsafe impl<T: Sync> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// Rows that follow one another without a gap.
    ///
    /// # Panics
    /// If `data` is not whole rows of `width`.
    pub fn new(data: &'a mut [T], width: usize) -> Self {
        let count = whole_rows(data.len(), width);
        Self::strided(data, count, width, width)
    }

    /// `count` rows of `width` values whose first values are `stride` apart. The last row need not
    /// be followed by a gap.
    ///
    /// # Panics
    /// If the rows do not lie in `data`, or overlap.
    pub fn strided(data: &'a mut [T], count: usize, stride: usize, width: usize) -> Self {
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
    pub fn row(&mut self, index: usize) -> &mut [T] {
        assert!(index < self.count, "row {index} of {}", self.count);
        // SAFETY: the constructor checked that row `index < count` lies in the borrowed buffer; cuts
        // only ever shrink count and width. No other `RowsMut` covers these columns of these rows
        // (cuts are disjoint and consume their parent), and `&mut self` keeps this one from giving
        // the row twice.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.stride), self.width) }
    }

    /// All values of rows without gaps.
    ///
    /// # Panics
    /// If there are gaps.
    pub(crate) fn into_slice(self) -> &'a mut [T] {
        assert!(self.count < 2 || self.width == self.stride, "rows with gaps");
        // SAFETY: as in `row`; rows without gaps are one range, and `self` is gone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.count * self.width) }
    }

    /// The same rows, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_, T> {
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

/// Where some rows are cut into parts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bands<'a> {
    /// Every so many rows.
    Every(usize),
    /// At these rows, ascending: band b ends where band b + 1 begins. Starts at 0, ends with the number of rows.
    At(&'a [u32]),
}

/// Rows to be cut into parts: by bands of rows, and each band by columns.
#[derive(Debug)]
pub(crate) struct Cut<'a, 'b, T = f32> {
    rows: RowsMut<'a, T>,
    bands: Bands<'b>,
    columns: usize,
}

/// One part of a [`Cut`].
#[derive(Debug)]
pub(crate) struct Part<'a, T = f32> {
    /// Which band of rows.
    pub(crate) band: usize,
    pub(crate) first_row: usize,
    pub(crate) first_column: usize,
    pub(crate) rows: RowsMut<'a, T>,
}

impl<'a, 'b, T> Cut<'a, 'b, T> {
    /// Parts of one band and at most `columns` columns.
    ///
    /// # Panics
    /// If the bands do not ascend from 0 to the number of rows.
    pub(crate) fn new(rows: RowsMut<'a, T>, bands: Bands<'b>, columns: usize) -> Self {
        assert!(columns > 0, "parts without columns");
        match bands {
            Bands::Every(step) => assert!(step > 0, "bands without rows"),
            Bands::At(rows_at) => {
                assert!(rows_at.is_sorted() && rows_at.first() == Some(&0), "bands ascend from 0");
                assert_eq!(
                    rows_at.last().copied(),
                    u32::try_from(rows.count).ok(),
                    "bands end with the rows"
                );
            }
        }
        Self { rows, bands, columns }
    }

    fn bands(&self) -> usize {
        match self.bands {
            Bands::Every(step) => self.rows.count.div_ceil(step),
            Bands::At(rows_at) => rows_at.len() - 1,
        }
    }

    /// Number of parts, band after band.
    pub(crate) fn parts(&self) -> usize {
        self.bands() * self.rows.width.div_ceil(self.columns)
    }

    /// Part `index`.
    ///
    /// # Safety
    /// No part may be asked for twice while the first is alive.
    unsafe fn part(&self, index: usize) -> Part<'_, T> {
        let across = self.rows.width.div_ceil(self.columns);
        let band = index / across;
        let (first, end) = match self.bands {
            Bands::Every(step) => (band * step, self.rows.count.min((band + 1) * step)),
            Bands::At(rows_at) => (rows_at[band] as usize, rows_at[band + 1] as usize),
        };
        let column = index % across * self.columns;
        assert!(end <= self.rows.count && column < self.rows.width, "part {index} of {}", self.parts());
        Part {
            band,
            first_row: first,
            first_column: column,
            rows: RowsMut {
                start: self.rows.start.wrapping_add(first * self.rows.stride + column),
                count: end - first,
                stride: self.rows.stride,
                width: self.columns.min(self.rows.width - column),
                borrow: PhantomData,
            },
        }
    }
}

/// `f(part)` for every part of `cut`, on all threads.
pub(crate) fn for_each_part<T: Send + Sync>(cut: Cut<'_, '_, T>, f: &(dyn Fn(Part<'_, T>) + Sync)) {
    // SAFETY: every index is run once, and parts of different indices do not overlap.
    team::run(cut.parts(), &|index| f(unsafe { cut.part(index) }));
}

/// `for_each_part` of two, the parts of the first before those of the second, in one region.
pub(crate) fn for_each_part_of_two<T: Send + Sync, U: Send + Sync>(
    (first, second): (Cut<'_, '_, T>, Cut<'_, '_, U>),
    f: &(dyn Fn(Part<'_, T>) + Sync),
    g: &(dyn Fn(Part<'_, U>) + Sync),
) {
    let firsts = first.parts();
    team::run(firsts + second.parts(), &|index| match index.checked_sub(firsts) {
        // SAFETY: every index is run once, and parts of different indices do not overlap.
        None => f(unsafe { first.part(index) }),
        // SAFETY: as above.
        Some(index) => g(unsafe { second.part(index) }),
    });
}

/// What is done with the rows of three at one index.
type RowsOfThree<'a, T, U, V> = dyn Fn(usize, &mut [T], &mut [U], &mut [V]) + Sync + 'a;

/// `f(index, row of each)` for every row of three, in bands of `rows`, on all threads.
///
/// # Panics
/// If they have not the same number of rows.
pub(crate) fn for_each_row_of_three<T: Send + Sync, U: Send + Sync, V: Send + Sync>(
    rows: usize,
    (a, b, c): (RowsMut<'_, T>, RowsMut<'_, U>, RowsMut<'_, V>),
    f: &RowsOfThree<'_, T, U, V>,
) {
    assert_eq!((a.count, a.count), (b.count, c.count), "rows of three");
    let widths = (a.width, b.width, c.width);
    let bands = Bands::Every(rows);
    let (a, b, c) =
        (Cut::new(a, bands, widths.0), Cut::new(b, bands, widths.1), Cut::new(c, bands, widths.2));
    team::run(a.bands(), &|index| {
        // SAFETY: every index is run once; bands of different indices do not overlap, and each is one part.
        let (mut a, mut b, mut c) = unsafe { (a.part(index), b.part(index), c.part(index)) };
        for i in 0..a.rows.count {
            f(a.first_row + i, a.rows.row(i), b.rows.row(i), c.rows.row(i));
        }
    });
}

/// Values added by one task, and by a call that stays on its thread.
const ADDED: usize = 64 * 1024;

/// `out[i] += x[i]`: a residual.
///
/// # Panics
/// If the lengths differ.
pub fn add(out: &mut [f32], x: &[f32]) {
    assert_eq!(out.len(), x.len(), "lengths to add");
    if out.is_empty() {
        return;
    }
    let len = out.len();
    for_each_part(Cut::new(RowsMut::new(out, len), Bands::Every(1), ADDED), &|mut part| {
        let out = part.rows.row(0);
        out.iter_mut().zip(&x[part.first_column..]).for_each(|(o, x)| *o += x);
    });
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
