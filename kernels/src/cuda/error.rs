//! What can go wrong on a device: which operation, which kernel, what the driver called it, and whether
//! the device can still be used.

use std::fmt;

/// A failed operation on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceError(Box<Details>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Details {
    operation: &'static str,
    kernel: Option<&'static str>,
    after: Option<&'static str>,
    cause: Cause,
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The driver returned an error.
    Driver {
        /// The number of the `CUresult`.
        code: u32,
        /// Its name, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// The driver's sentence for it, with what this crate can add.
        text: String,
    },
    /// There is no usable driver or device.
    Unavailable(String),
    /// Refused before the driver was asked: a limit or a rule of this module was broken.
    Refused(String),
}

/// `CUresult` values that this module tells apart.
pub(super) mod code {
    pub const INVALID_VALUE: u32 = 1;
    pub const OUT_OF_MEMORY: u32 = 2;
    pub const NO_BINARY_FOR_GPU: u32 = 209;
    pub const INVALID_PTX: u32 = 218;
    pub const UNSUPPORTED_PTX_VERSION: u32 = 222;
}

/// Whether a context is of no use after the error `code`.
///
/// These are the errors of which the driver's documentation says that the process must be terminated and
/// started again, plus those that mean that the device or the driver has gone away.
fn loses_device(code: u32) -> bool {
    match code {
        // Deinitialised, device unavailable.
        4 | 46 => true,
        // Uncorrectable ECC error, uncorrectable NVLink error, contained error.
        214 | 220 | 226 => true,
        // Illegal address; launch timeout; context destroyed; assertion.
        700 | 702 | 709 | 710 => true,
        // Stack, instruction, alignment, address space, program counter; launch failed; tensor memory leak.
        714..=719 | 721 => true,
        // MPS client terminated; external device; unknown.
        810 | 911 | 999 => true,
        _ => false,
    }
}

impl DeviceError {
    pub(super) fn new(operation: &'static str, cause: Cause) -> Self {
        Self(Box::new(Details { operation, kernel: None, after: None, cause }))
    }

    pub(super) fn refused(operation: &'static str, reason: impl Into<String>) -> Self {
        Self::new(operation, Cause::Refused(reason.into()))
    }

    pub(super) fn unavailable(operation: &'static str, reason: impl Into<String>) -> Self {
        Self::new(operation, Cause::Unavailable(reason.into()))
    }

    /// The same error, said of `kernel`.
    pub(super) fn about(mut self, kernel: Option<&'static str>) -> Self {
        self.0.kernel = kernel;
        self
    }

    /// The same error, found some time after `kernel` was launched.
    pub(super) fn found_after(mut self, kernel: Option<&'static str>) -> Self {
        self.0.after = kernel;
        self
    }

    /// What was being done, such as `"launch"` or `"allocate device memory"`.
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The kernel that the operation was about, where it was about one.
    pub fn kernel(&self) -> Option<&'static str> {
        self.0.kernel
    }

    /// Why it failed.
    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// The driver's number for the error, where the driver returned one.
    pub fn code(&self) -> Option<u32> {
        match self.0.cause {
            Cause::Driver { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Whether the device's memory did not suffice. The device is fine.
    pub fn is_out_of_memory(&self) -> bool {
        self.code() == Some(code::OUT_OF_MEMORY)
    }

    /// Whether the device cannot be used any more by this process.
    pub fn is_lost(&self) -> bool {
        self.code().is_some_and(loses_device)
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Details { operation, kernel, after, cause } = &*self.0;
        write!(f, "CUDA: {operation}")?;
        if let Some(kernel) = kernel {
            write!(f, " of kernel {kernel}")?;
        }
        match cause {
            Cause::Driver { name, text, .. } => write!(f, ": {name} ({text})")?,
            Cause::Unavailable(reason) | Cause::Refused(reason) => write!(f, ": {reason}")?,
        }
        if self.is_lost() {
            if let Some(after) = after {
                write!(f, "; the last kernel launched before was {after}")?;
            }
            write!(f, "; this process cannot use the device any more")?;
        }
        Ok(())
    }
}

impl std::error::Error for DeviceError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(code: u32, name: &str, text: &str) -> Cause {
        Cause::Driver { code, name: name.into(), text: text.into() }
    }

    #[test]
    fn says_operation_kernel_and_cause() {
        let cause =
            driver(701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch");
        let error = DeviceError::new("launch", cause).about(Some("route")).found_after(Some("norm"));
        assert_eq!(
            error.to_string(),
            "CUDA: launch of kernel route: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (too many resources \
             requested for launch)"
        );
        assert!(!error.is_lost());
    }

    #[test]
    fn says_when_the_device_is_lost_and_what_ran_before() {
        let cause = driver(700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered");
        let error = DeviceError::new("wait for the device", cause).found_after(Some("experts"));
        assert!(error.is_lost());
        assert_eq!(
            error.to_string(),
            "CUDA: wait for the device: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was \
             encountered); the last kernel launched before was experts; this process cannot use the device any more"
        );
    }

    #[test]
    fn memory_that_runs_out_does_not_lose_the_device() {
        let error = DeviceError::new("allocate", driver(2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"));
        assert!(error.is_out_of_memory() && !error.is_lost());
    }
}
