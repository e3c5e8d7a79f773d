//! Finding a device, opening it, and what it says about itself.

use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::context::{Context, guarded};
use super::error::{DeviceError, code};

/// The oldest compute capability that the kernels run on (bf16 products, asynchronous copies).
const OLDEST: (u32, u32) = (8, 0);

/// What a look at this machine found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// No NVIDIA driver library.
    NoDriver,
    /// A driver that offers no device, or cannot be used.
    NoDevice(String),
    /// Devices, in the driver's order. Not every one need be usable: [`DeviceSummary::is_usable`].
    Devices(Vec<DeviceSummary>),
}

/// A device as [`Device::probe`] sees it, without starting it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSummary {
    /// Number to open it with.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Memory in bytes.
    pub memory_bytes: usize,
}

impl DeviceSummary {
    /// Whether the kernels run on it.
    pub fn is_usable(&self) -> bool {
        self.compute_capability >= OLDEST
    }
}

impl fmt::Display for Availability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDriver => write!(f, "no CUDA driver library"),
            Self::NoDevice(reason) => write!(f, "no CUDA device: {reason}"),
            Self::Devices(devices) => {
                for (index, device) in devices.iter().enumerate() {
                    let (major, minor) = device.compute_capability;
                    let separator = if index == 0 { "" } else { "; " };
                    let gib = device.memory_bytes as f64 / (1u64 << 30) as f64;
                    write!(
                        f,
                        "{separator}{}: {} ({major}.{minor}, {gib:.1} GiB",
                        device.ordinal, device.name
                    )?;
                    write!(f, "{})", if device.is_usable() { "" } else { ", too old" })?;
                }
                Ok(())
            }
        }
    }
}

/// What an open device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number it was opened with.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// The newest CUDA version that the driver supports, major and minor.
    pub driver: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub memory_bytes: usize,
    /// Second-level cache in bytes.
    pub l2_bytes: usize,
    /// The most shared memory that a block can ask for.
    pub shared_bytes_per_block: usize,
    /// Shared memory of a multiprocessor.
    pub shared_bytes_per_multiprocessor: usize,
    /// 32-bit registers of a multiprocessor.
    pub registers_per_multiprocessor: u32,
    /// Highest clock of the multiprocessors in kHz; 0 if unknown.
    pub clock_khz: u32,
    /// Highest clock of the memory in kHz; 0 if unknown.
    pub memory_clock_khz: u32,
    /// Width of the memory bus in bits; 0 if unknown.
    pub memory_bus_bits: u32,
}

/// Memory of a device at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that nobody has allocated.
    pub free_bytes: usize,
    /// All bytes.
    pub total_bytes: usize,
}

/// An open device with its one stream. One thread at a time owns it; buffers and graphs keep what they
/// need of it alive.
pub struct Device {
    pub(super) context: Arc<Context>,
    /// Launches of two threads would mix on the one stream, and in its captures.
    one_thread: PhantomData<Cell<()>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("info", self.info()).finish_non_exhaustive()
    }
}

impl Device {
    /// Looks for devices. Never panics and starts nothing on them.
    pub fn probe() -> Availability {
        if !library_is_present() {
            return Availability::NoDriver;
        }
        let devices = start().and_then(|count| (0..count).map(summary).collect::<Result<Vec<_>, _>>());
        match devices {
            Ok(devices) if devices.is_empty() => Availability::NoDevice("the driver counts none".into()),
            Ok(devices) => Availability::Devices(devices),
            Err(error) => Availability::NoDevice(error.to_string()),
        }
    }

    /// Opens the device that the driver counts as `ordinal`.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        const OPEN: &str = "open the device";
        if !library_is_present() {
            return Err(DeviceError::unavailable(OPEN, "no CUDA driver library"));
        }
        let count = start()?;
        if ordinal >= count {
            return Err(DeviceError::unavailable(
                OPEN,
                format!("there is no device {ordinal}, only {count}"),
            ));
        }
        let summary = summary(ordinal)?;
        let (major, minor) = summary.compute_capability;
        if !summary.is_usable() {
            let reason = format!(
                "{} has compute capability {major}.{minor}; {}.{} or newer is needed",
                summary.name, OLDEST.0, OLDEST.1
            );
            return Err(DeviceError::unavailable(OPEN, reason));
        }
        let info = describe(summary)?;
        let context = Context::new(handle(ordinal)?, info)?;
        Ok(Self { context, one_thread: PhantomData })
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.context.info
    }

    /// Its memory at this moment.
    pub fn memory(&self) -> Result<MemoryInfo, DeviceError> {
        let (mut free_bytes, mut total_bytes) = (0, 0);
        // SAFETY: the driver writes two numbers.
        self.context.call("ask for free memory", || unsafe {
            sys::cuMemGetInfo_v2(&mut free_bytes, &mut total_bytes)
        })?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }

    /// Waits until everything asked of the device is done, and returns what went wrong on it.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.context.synchronize("wait for the device")
    }

    /// Whether a graph is being captured.
    pub fn is_capturing(&self) -> bool {
        self.context.is_capturing()
    }
}

fn library_is_present() -> bool {
    // SAFETY: loads and unloads the driver library, whose initialisers may run at any time.
    std::panic::catch_unwind(|| unsafe { sys::is_culib_present() }).unwrap_or(false)
}

/// Starts the driver and counts its devices.
fn start() -> Result<usize, DeviceError> {
    // SAFETY: may be called at any time, and again.
    guarded("start the driver", || unsafe { sys::cuInit(0) })?;
    let mut count = 0;
    // SAFETY: the driver writes one number.
    guarded("count the devices", || unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn handle(ordinal: usize) -> Result<sys::CUdevice, DeviceError> {
    let mut device = 0;
    // SAFETY: the driver writes one number.
    guarded("find the device", || unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
    Ok(device)
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<u32, DeviceError> {
    let mut value = 0;
    // SAFETY: the driver writes one number.
    let call = || unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    guarded("ask for an attribute of the device", call)?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn summary(ordinal: usize) -> Result<DeviceSummary, DeviceError> {
    let device = handle(ordinal)?;
    let mut name = [0 as c_char; 256];
    // SAFETY: the driver writes at most that many characters.
    guarded("ask for the device's name", || unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device)
    })?;
    *name.last_mut().expect("256 characters") = 0;
    // SAFETY: the last character is 0.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory_bytes = 0;
    // SAFETY: the driver writes one number.
    guarded("ask for the device's memory", || unsafe {
        sys::cuDeviceTotalMem_v2(&mut memory_bytes, device)
    })?;
    let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(DeviceSummary { ordinal, name, compute_capability: (major, minor), memory_bytes })
}

fn describe(summary: DeviceSummary) -> Result<DeviceInfo, DeviceError> {
    let device = handle(summary.ordinal)?;
    let mut version = 0;
    // SAFETY: the driver writes one number.
    guarded("ask for the driver's version", || unsafe { sys::cuDriverGetVersion(&mut version) })?;
    let version = u32::try_from(version).unwrap_or(0);
    let ask = |name| attribute(device, name);
    let bytes = |name| attribute(device, name).map(|value| value as usize);
    // Nothing depends on these, and a driver may not know them.
    let perhaps = |name| match attribute(device, name) {
        Err(error) if error.code() == Some(code::INVALID_VALUE) => Ok(0),
        answer => answer,
    };
    Ok(DeviceInfo {
        ordinal: summary.ordinal,
        name: summary.name,
        compute_capability: summary.compute_capability,
        driver: (version / 1000, version % 1000 / 10),
        multiprocessors: ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: summary.memory_bytes,
        l2_bytes: bytes(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        shared_bytes_per_block: bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_bytes_per_multiprocessor: bytes(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        registers_per_multiprocessor: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
        clock_khz: perhaps(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        memory_clock_khz: perhaps(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
        memory_bus_bits: perhaps(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn availability_reads_as_one_line() {
        let device = |ordinal, name: &str, compute_capability| DeviceSummary {
            ordinal,
            name: name.into(),
            compute_capability,
            memory_bytes: 80 << 30,
        };
        let devices = vec![device(0, "Hopper", (9, 0)), device(1, "Turing", (7, 5))];
        assert_eq!(
            Availability::Devices(devices).to_string(),
            "0: Hopper (9.0, 80.0 GiB); 1: Turing (7.5, 80.0 GiB, too old)"
        );
        assert_eq!(Availability::NoDriver.to_string(), "no CUDA driver library");
    }

    #[test]
    fn a_look_never_panics() {
        let found = Device::probe();
        let usable = matches!(&found, Availability::Devices(devices) if devices[0].is_usable());
        match Device::open(0) {
            Ok(device) => assert!(usable, "{found}: {device:?}"),
            // A device may be busy or exclusive; without a driver there is only one answer.
            Err(error) if found == Availability::NoDriver => {
                assert_eq!(error.to_string(), "CUDA: open the device: no CUDA driver library");
            }
            Err(error) => println!("{found}: {error}"),
        }
    }
}
