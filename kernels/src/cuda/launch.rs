//! Launching a kernel: its arguments, the limits that are checked before the driver is asked, and how many
//! blocks fit on the device at once.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use super::buffer::{Buffer, Plain, Slice};
use super::context::Context;
use super::device::{Device, DeviceInfo};
use super::error::DeviceError;
use super::host::HostBuffer;
use super::image::{self, Function, Kernel};

/// The most arguments of a kernel.
pub const MAX_ARGUMENTS: usize = 40;
/// Shared memory that a kernel has without asking for more.
const SHARED_BYTES_UNASKED: usize = 48 << 10;
/// The first architecture whose kernels can start early.
const EARLY_ARCHITECTURE: u32 = 90;
const LAUNCH: &str = "launch";

/// Blocks of a launch in three directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x.
    pub x: u32,
    /// Blocks along y.
    pub y: u32,
    /// Blocks along z.
    pub z: u32,
}

impl From<u32> for Grid {
    fn from(x: u32) -> Self {
        Self { x, y: 1, z: 1 }
    }
}

impl From<(u32, u32)> for Grid {
    fn from((x, y): (u32, u32)) -> Self {
        Self { x, y, z: 1 }
    }
}

impl From<(u32, u32, u32)> for Grid {
    fn from((x, y, z): (u32, u32, u32)) -> Self {
        Self { x, y, z }
    }
}

/// What a kernel can be passed.
pub trait Argument {
    /// Adds the value to the launch.
    fn add_to(self, launch: &mut Launch<'_>);
}

macro_rules! numbers {
    ($($number:ty => $bits:expr),* $(,)?) => { $(
        impl Argument for $number {
            fn add_to(self, launch: &mut Launch<'_>) {
                let bits: fn($number) -> u64 = $bits;
                launch.push(bits(self));
            }
        }
    )* };
}
// An argument lies at the low end of its eight bytes: the machine is little endian.
numbers! {
    u32 => |value| value.into(),
    i32 => |value| (value as u32).into(),
    u64 => |value| value,
    f32 => |value| value.to_bits().into(),
}

impl<T: Plain> Argument for Slice<'_, T> {
    fn add_to(self, launch: &mut Launch<'_>) {
        launch.device.context.keep(self.memory);
        launch.push(self.address());
    }
}

impl<T: Plain> Argument for &Slice<'_, T> {
    fn add_to(self, launch: &mut Launch<'_>) {
        (*self).add_to(launch);
    }
}

impl<T: Plain> Argument for &Buffer<T> {
    fn add_to(self, launch: &mut Launch<'_>) {
        self.all().add_to(launch);
    }
}

impl<T: Plain> Argument for &HostBuffer<T> {
    fn add_to(self, launch: &mut Launch<'_>) {
        Slice::from(self).add_to(launch);
    }
}

/// A null pointer where there is none.
impl<T: Plain> Argument for Option<Slice<'_, T>> {
    fn add_to(self, launch: &mut Launch<'_>) {
        match self {
            Some(slice) => slice.add_to(launch),
            None => launch.push(0),
        }
    }
}

/// A null pointer where there is none.
impl<T: Plain> Argument for Option<&Buffer<T>> {
    fn add_to(self, launch: &mut Launch<'_>) {
        self.map(Buffer::all).add_to(launch);
    }
}

/// A launch being put together.
#[must_use = "a launch does nothing before `run`"]
pub struct Launch<'d> {
    device: &'d Device,
    kernel: Kernel,
    grid: Grid,
    threads: u32,
    shared_bytes: usize,
    early: bool,
    arguments: [u64; MAX_ARGUMENTS],
    count: usize,
}

/// How a kernel fits on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Blocks that a multiprocessor holds at once.
    pub blocks_per_multiprocessor: u32,
    /// Blocks that the device holds at once.
    pub blocks: u32,
}

impl Device {
    /// Begins a launch of `kernel` on `grid` blocks of `threads` threads with `shared_bytes` of dynamic
    /// shared memory each.
    pub fn launch(
        &self,
        kernel: Kernel,
        grid: impl Into<Grid>,
        threads: u32,
        shared_bytes: usize,
    ) -> Launch<'_> {
        Launch {
            device: self,
            kernel,
            grid: grid.into(),
            threads,
            shared_bytes,
            early: false,
            arguments: [0; MAX_ARGUMENTS],
            count: 0,
        }
    }

    /// How many blocks of such a launch the device holds at once: the grid of a persistent kernel.
    pub fn residency(
        &self,
        kernel: Kernel,
        threads: u32,
        shared_bytes: usize,
    ) -> Result<Residency, DeviceError> {
        let context = &self.context;
        let function = prepare(context, kernel, Grid::from(1), threads, shared_bytes)?;
        let mut count = 0;
        // SAFETY: the function lives as long as the context; the driver writes one number.
        context.call_about("ask for the residency", Some(kernel.name), || unsafe {
            let blocks = &mut count;
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                blocks,
                function.raw,
                threads as i32,
                shared_bytes,
            )
        })?;
        let blocks_per_multiprocessor = u32::try_from(count).unwrap_or(0);
        let blocks = blocks_per_multiprocessor * context.info.multiprocessors;
        Ok(Residency { blocks_per_multiprocessor, blocks })
    }

    /// Loads `kernel` now rather than at its first launch, which takes the driver's time to compile where
    /// no machine code is embedded.
    pub fn load(&self, kernel: Kernel) -> Result<(), DeviceError> {
        image::function(&self.context, kernel).map(|_| ())
    }
}

impl Launch<'_> {
    /// Adds the next argument of the kernel.
    pub fn arg(mut self, argument: impl Argument) -> Self {
        argument.add_to(&mut self);
        self
    }

    /// Lets the kernel start while the one before it ends, where the device and the kernel's code can (compute
    /// capability 9.0). The kernel must call `wait_for_previous` before it touches anything that an earlier
    /// one wrote, or writes anything that an earlier one reads.
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    fn push(&mut self, bits: u64) {
        assert!(self.count < MAX_ARGUMENTS, "{}: too many arguments", self.kernel.name);
        self.arguments[self.count] = bits;
        self.count += 1;
    }

    /// Puts the launch into the stream. It does not wait; what goes wrong in the kernel is returned by a
    /// later operation.
    ///
    /// # Safety
    ///
    /// The arguments must be those that the kernel declares, in number, order and type, and with them the
    /// kernel must stay inside the memory that it is passed.
    pub unsafe fn run(mut self) -> Result<(), DeviceError> {
        let context = &*self.device.context;
        let function = prepare(context, self.kernel, self.grid, self.threads, self.shared_bytes)?;
        let mut pointers = [ptr::null_mut::<c_void>(); MAX_ARGUMENTS];
        for (pointer, argument) in pointers.iter_mut().zip(&mut self.arguments[..self.count]) {
            *pointer = ptr::from_mut(argument).cast();
        }
        let begun = context.profiler.begin(context, self.kernel.name)?;
        let early = self.early && function.architecture >= EARLY_ARCHITECTURE;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: self.grid.x,
            gridDimY: self.grid.y,
            gridDimZ: self.grid.z,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: context.stream,
            attrs: &mut attribute,
            numAttrs: early.into(),
        };
        // SAFETY: the function lives as long as the context; the driver copies the arguments before it
        // returns; the rest is the caller's promise. Memory outlives the kernel: freeing waits for it.
        let launched = context.call_about(LAUNCH, Some(self.kernel.name), || unsafe {
            sys::cuLaunchKernelEx(&config, function.raw, pointers.as_mut_ptr(), ptr::null_mut())
        });
        if launched.is_ok() {
            context.launched(self.kernel.name);
        }
        if let Some(begun) = begun {
            context.profiler.end(context, begun)?;
        }
        launched
    }
}

/// Finds the function, checks the launch against its limits, and allows it large shared memory.
fn prepare(
    context: &Context,
    kernel: Kernel,
    grid: Grid,
    threads: u32,
    shared_bytes: usize,
) -> Result<Function, DeviceError> {
    let refused = |reason| DeviceError::refused(LAUNCH, reason).about(Some(kernel.name));
    let function = image::function(context, kernel)?;
    check(&context.info, &function, grid, threads, shared_bytes).map_err(refused)?;
    let wanted = function.static_shared_bytes + shared_bytes;
    if wanted > SHARED_BYTES_UNASKED && !function.large_shared {
        let most = context.info.shared_bytes_per_block - function.static_shared_bytes;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives as long as the context.
        context.call_about("allow large shared memory", Some(kernel.name), || unsafe {
            sys::cuFuncSetAttribute(function.raw, attribute, most as i32)
        })?;
        image::note_large_shared(context, kernel);
    }
    Ok(function)
}

/// What the launch breaks, if anything.
fn check(
    info: &DeviceInfo,
    function: &Function,
    grid: Grid,
    threads: u32,
    shared_bytes: usize,
) -> Result<(), String> {
    let Grid { x, y, z } = grid;
    if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65_535 || z > 65_535 {
        return Err(format!(
            "a grid of {x} x {y} x {z} blocks; from 1 to 2147483647 x 65535 x 65535 are possible"
        ));
    }
    if threads == 0 || threads > function.max_threads {
        return Err(format!("blocks of {threads} threads; from 1 to {} are possible", function.max_threads));
    }
    let fixed = function.static_shared_bytes;
    if fixed.saturating_add(shared_bytes) > info.shared_bytes_per_block {
        return Err(format!(
            "{shared_bytes} bytes of dynamic and {fixed} of static shared memory; {} has {} per block",
            info.name, info.shared_bytes_per_block
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> DeviceInfo {
        DeviceInfo {
            ordinal: 0,
            name: "Ampere".into(),
            compute_capability: (8, 6),
            driver: (12, 8),
            multiprocessors: 84,
            memory_bytes: 24 << 30,
            l2_bytes: 6 << 20,
            shared_bytes_per_block: 99 << 10,
            shared_bytes_per_multiprocessor: 100 << 10,
            registers_per_multiprocessor: 65_536,
            clock_khz: 0,
            memory_clock_khz: 0,
            memory_bus_bits: 0,
        }
    }

    #[test]
    fn limits_are_checked_before_the_driver_is_asked() {
        let function = Function {
            raw: ptr::null_mut(),
            static_shared_bytes: 1024,
            max_threads: 512,
            architecture: 80,
            large_shared: false,
        };
        let check = |grid: Grid, threads, shared| check(&info(), &function, grid, threads, shared);
        assert_eq!(check(1.into(), 512, 98 << 10), Ok(()));
        assert_eq!(check((1, 65_535, 65_535).into(), 1, 0), Ok(()));
        let grid = check((4, 0).into(), 32, 0).unwrap_err();
        assert!(grid.starts_with("a grid of 4 x 0 x 1 blocks"), "{grid}");
        assert!(check((1, 65_536).into(), 32, 0).is_err());
        assert!(check((1, 1, 65_536).into(), 32, 0).is_err());
        assert_eq!(check(1.into(), 513, 0).unwrap_err(), "blocks of 513 threads; from 1 to 512 are possible");
        assert!(check(1.into(), 0, 0).is_err());
        assert_eq!(
            check(1.into(), 32, (98 << 10) + 1).unwrap_err(),
            "100353 bytes of dynamic and 1024 of static shared memory; Ampere has 101376 per block"
        );
    }
}
