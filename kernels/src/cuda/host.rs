//! Pinned host memory that the device reads and writes directly: inputs of a step, and rings that the host
//! reads without waiting for the device.

use std::marker::PhantomData;
use std::mem::size_of;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::buffer::Plain;
use super::context::{Block, Memory};
use super::device::Device;
use super::error::DeviceError;

/// Pinned host memory for `len` values with an address on the device too; zeroed at first, freed on drop.
///
/// Host and device may touch it at the same time, so values are read and written one by one and never
/// borrowed. What the device has written is certain to be here after [`Device::synchronize`]; before that, a
/// value is either the old or the new one.
pub struct HostBuffer<T> {
    pub(super) memory: Arc<Memory>,
    pointer: *mut T,
    len: usize,
    values: PhantomData<T>,
}

// SAFETY: the memory is pinned for the whole life of the value and is not tied to a thread.
unsafe impl<T: Plain> Send for HostBuffer<T> {}

impl Device {
    /// Pinned host memory for `len` values, zeroed.
    pub fn host<T: Plain>(&self, len: usize) -> Result<HostBuffer<T>, DeviceError> {
        const ALLOCATE: &str = "allocate pinned host memory";
        self.context.outside_capture(ALLOCATE)?;
        let bytes = len.checked_mul(size_of::<T>());
        let bytes =
            bytes.ok_or_else(|| DeviceError::refused(ALLOCATE, format!("{len} values are too many")))?;
        let bytes = bytes.max(1);
        let mut pointer = ptr::null_mut();
        // SAFETY: the driver writes an address.
        self.context.call(ALLOCATE, || unsafe {
            sys::cuMemHostAlloc(&mut pointer, bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP)
        })?;
        let mut memory = Memory {
            context: self.context.clone(),
            block: Block::Host { pointer: pointer.cast(), address: 0 },
        };
        // SAFETY: the memory has that many bytes and nobody else knows of it.
        unsafe { ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        let mut address = 0;
        // SAFETY: the driver writes the address for memory that it has mapped.
        self.context.call("map pinned host memory", || unsafe {
            sys::cuMemHostGetDevicePointer_v2(&mut address, pointer, 0)
        })?;
        memory.block = Block::Host { pointer: pointer.cast(), address };
        Ok(HostBuffer { memory: Arc::new(memory), pointer: pointer.cast(), len, values: PhantomData })
    }
}

impl<T: Plain> HostBuffer<T> {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// The value at `index`.
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.len, "value {index} of {}", self.len);
        // SAFETY: inside; volatile, because the device may write it meanwhile.
        unsafe { self.pointer.add(index).read_volatile() }
    }

    /// Sets the value at `index`.
    pub fn set(&self, index: usize, value: T) {
        assert!(index < self.len, "value {index} of {}", self.len);
        // SAFETY: inside; volatile, because the device may read it meanwhile. No other thread of the host
        // writes: the type is not `Sync`.
        unsafe { self.pointer.add(index).write_volatile(value) }
    }

    /// Sets the values from `first` on.
    pub fn write(&self, first: usize, values: &[T]) {
        assert!(first <= self.len && values.len() <= self.len - first, "values beyond the end");
        for (index, value) in values.iter().enumerate() {
            self.set(first + index, *value);
        }
    }

    /// A copy of all values.
    pub fn to_vec(&self) -> Vec<T> {
        (0..self.len).map(|index| self.get(index)).collect()
    }
}
