//! Device memory with a type: allocated once, freed on drop, and borrowed in parts.

use std::marker::PhantomData;
use std::mem::{align_of, size_of};
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use cudarc::driver::sys;
use half::{bf16, f16};

use super::context::{Block, Memory};
use super::device::Device;
use super::error::DeviceError;
use super::host::HostBuffer;

/// Numbers of which every bit pattern is a value, and which hold no address.
///
/// # Safety
///
/// The type must have no padding and no invalid bit pattern.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($number:ty),*) => { $(
        // SAFETY: a number without padding; every bit pattern is a value.
        unsafe impl Plain for $number {}
    )* };
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, bf16, f16);

/// Device memory for `len` values, freed on drop. What the device does to it goes through the stream, so
/// a shared reference is enough to write.
pub struct Buffer<T> {
    memory: Arc<Memory>,
    len: usize,
    values: PhantomData<T>,
}

/// A part of a [`Buffer`].
pub struct Slice<'a, T> {
    pub(super) memory: &'a Arc<Memory>,
    offset_bytes: usize,
    len: usize,
    values: PhantomData<T>,
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Slice<'_, T> {}

impl Device {
    /// Memory for `len` values. What it holds before it is written is anything.
    pub fn alloc<T: Plain>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        const ALLOCATE: &str = "allocate device memory";
        self.context.outside_capture(ALLOCATE)?;
        let bytes = len.checked_mul(size_of::<T>());
        let bytes =
            bytes.ok_or_else(|| DeviceError::refused(ALLOCATE, format!("{len} values are too many")))?;
        let mut address = 0;
        // SAFETY: the driver writes an address. It refuses to allocate nothing, hence at least a byte.
        self.context.call(ALLOCATE, || unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) })?;
        let memory = Memory { context: self.context.clone(), block: Block::Device { address } };
        Ok(Buffer { memory: Arc::new(memory), len, values: PhantomData })
    }

    /// Memory for `len` values, all bytes 0.
    pub fn zeroed<T: Plain>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        let buffer = self.alloc(len)?;
        buffer.zero()?;
        Ok(buffer)
    }

    /// Memory that holds a copy of `values`.
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<Buffer<T>, DeviceError> {
        let buffer = self.alloc(values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }
}

impl<T: Plain> Buffer<T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// All of it.
    pub fn all(&self) -> Slice<'_, T> {
        Slice { memory: &self.memory, offset_bytes: 0, len: self.len, values: PhantomData }
    }

    /// A part of it. Panics if the part is not inside.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Slice<'_, T> {
        self.all().slice(range)
    }

    /// See [`Slice::write`].
    pub fn write(&self, values: &[T]) -> Result<(), DeviceError> {
        self.all().write(values)
    }

    /// See [`Slice::read`].
    pub fn read(&self) -> Result<Vec<T>, DeviceError> {
        self.all().read()
    }

    /// See [`Slice::copy_from`].
    pub fn copy_from<'a>(&self, source: impl Into<Slice<'a, T>>) -> Result<(), DeviceError> {
        self.all().copy_from(source)
    }

    /// See [`Slice::zero`].
    pub fn zero(&self) -> Result<(), DeviceError> {
        self.all().zero()
    }
}

impl<'a, T: Plain> From<&'a Buffer<T>> for Slice<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        buffer.all()
    }
}

impl<'a, T: Plain> From<&'a HostBuffer<T>> for Slice<'a, T> {
    fn from(buffer: &'a HostBuffer<T>) -> Self {
        Slice { memory: &buffer.memory, offset_bytes: 0, len: buffer.len(), values: PhantomData }
    }
}

impl<'a, T: Plain> Slice<'a, T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.memory.address() + self.offset_bytes as u64
    }

    /// A part of it. Panics if the part is not inside.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Slice<'a, T> {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        assert!(start <= end && end <= self.len, "{start}..{end} of {} values", self.len);
        let offset_bytes = self.offset_bytes + start * size_of::<T>();
        Slice { memory: self.memory, offset_bytes, len: end - start, values: PhantomData }
    }

    /// The same bytes as values of another type. Panics if they do not divide into such values.
    pub fn cast<U: Plain>(&self) -> Slice<'a, U> {
        assert!(self.bytes().is_multiple_of(size_of::<U>()), "{} bytes do not divide", self.bytes());
        assert!(
            self.address().is_multiple_of(align_of::<U>() as u64),
            "{:#x} is not aligned",
            self.address()
        );
        let len = self.bytes() / size_of::<U>();
        Slice { memory: self.memory, offset_bytes: self.offset_bytes, len, values: PhantomData }
    }

    /// Copies `values` here, and waits for it. Panics unless there are as many.
    pub fn write(&self, values: &[T]) -> Result<(), DeviceError> {
        const WRITE: &str = "copy to the device";
        assert_eq!(values.len(), self.len, "values to write");
        let context = &self.memory.context;
        context.outside_capture(WRITE)?;
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: both sides hold that many bytes, and the host's side is borrowed until the stream is done.
        context.call(WRITE, || unsafe {
            sys::cuMemcpyHtoDAsync_v2(self.address(), values.as_ptr().cast(), self.bytes(), context.stream)
        })?;
        context.synchronize(WRITE)
    }

    /// Waits for everything before, and copies the values to the host.
    pub fn read(&self) -> Result<Vec<T>, DeviceError> {
        let mut values = Vec::with_capacity(self.len);
        // SAFETY: the capacity is that of `len` values.
        unsafe { self.read_to(values.as_mut_ptr())? };
        // SAFETY: `read_to` has written them all, and every bit pattern is a value.
        unsafe { values.set_len(self.len) };
        Ok(values)
    }

    /// Waits for everything before, and copies the values to `values`. Panics unless there are as many.
    pub fn read_into(&self, values: &mut [T]) -> Result<(), DeviceError> {
        assert_eq!(values.len(), self.len, "values to read");
        // SAFETY: room for `len` values, borrowed until they have arrived.
        unsafe { self.read_to(values.as_mut_ptr()) }
    }

    /// # Safety
    ///
    /// There must be room for `len` values.
    unsafe fn read_to(&self, values: *mut T) -> Result<(), DeviceError> {
        const READ: &str = "copy from the device";
        let context = &self.memory.context;
        context.outside_capture(READ)?;
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: both sides hold that many bytes until the stream is done.
        context.call(READ, || unsafe {
            sys::cuMemcpyDtoHAsync_v2(values.cast(), self.address(), self.bytes(), context.stream)
        })?;
        context.synchronize(READ)
    }

    /// Copies the values of `source` (device memory or a [`HostBuffer`]) here, in the stream's order and
    /// without waiting. Works while a graph is captured. Panics unless there are as many values.
    ///
    /// A [`HostBuffer`] is read when the stream gets there: it must not be written before.
    pub fn copy_from<'b>(&self, source: impl Into<Slice<'b, T>>) -> Result<(), DeviceError> {
        let source = source.into();
        assert_eq!(source.len, self.len, "values to copy");
        if self.is_empty() {
            return Ok(());
        }
        let context = &self.memory.context;
        assert!(Arc::ptr_eq(context, &source.memory.context), "a copy between two devices");
        context.keep(self.memory);
        context.keep(source.memory);
        // SAFETY: both sides hold that many bytes. They outlive the copy: freeing waits for the stream,
        // and a graph keeps them.
        context.call("copy on the device", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(self.address(), source.address(), self.bytes(), context.stream)
        })
    }

    /// Sets all bytes to 0, in the stream's order and without waiting. Works while a graph is captured.
    pub fn zero(&self) -> Result<(), DeviceError> {
        if self.is_empty() {
            return Ok(());
        }
        let context = &self.memory.context;
        context.keep(self.memory);
        // SAFETY: that many bytes are here, and outlive the operation as in `copy_from`.
        context.call("set device memory", || unsafe {
            sys::cuMemsetD8Async(self.address(), 0, self.bytes(), context.stream)
        })
    }
}
