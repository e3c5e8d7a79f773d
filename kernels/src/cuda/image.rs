//! The embedded kernels: which form of a file a device is given, and the functions loaded from it.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::io::Read;
use std::ptr;

use cudarc::driver::sys;
use flate2::read::GzDecoder;

use super::context::{Context, lock};
use super::device::DeviceInfo;
use super::error::{Cause, DeviceError, code};
use super::source;

const LOAD: &str = "load the file";
/// Bytes for what the driver's compiler has to say.
const LOG_BYTES: usize = 4096;

/// A kernel, by the file that holds it and its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The file below `kernels/cuda`, without `.cu`.
    pub file: &'static str,
    /// The function.
    pub name: &'static str,
}

impl Kernel {
    /// The kernel `name` of `kernels/cuda/<file>.cu`.
    pub const fn new(file: &'static str, name: &'static str) -> Self {
        Self { file, name }
    }
}

/// The compiled forms of one `.cu` file.
struct File {
    name: &'static str,
    /// Machine code for all architectures, in builds that carry it.
    machine_code: Option<&'static [u8]>,
    /// Architecture and compressed text. `"80"` is always there and runs everywhere.
    ptx: &'static [(&'static str, &'static [u8])],
}

// `FILES`, and for the tests `SOURCES` with the hash of each file; written by build.rs.
include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));

/// A loaded function. Lives as long as its context.
#[derive(Clone, Copy)]
pub(super) struct Function {
    pub raw: sys::CUfunction,
    pub static_shared_bytes: usize,
    pub max_threads: u32,
    /// Architecture of the PTX that it was made from: 80, 90, ...
    pub architecture: u32,
    /// Whether it was allowed more shared memory than a kernel has unasked.
    pub large_shared: bool,
}

/// The modules of a context, each loaded when its first kernel is asked for.
#[derive(Default)]
pub(super) struct Modules {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<Kernel, Function>,
}

// SAFETY: the driver's handles are plain addresses that any thread may use.
unsafe impl Send for Modules {}

impl Modules {
    pub(super) fn unload(self, context: &Context) {
        for module in self.modules.into_values() {
            // SAFETY: loaded by this context and unloaded once.
            context.release("unload kernels", || unsafe { sys::cuModuleUnload(module) });
        }
    }
}

/// The function of `kernel`, loaded if it was not.
pub(super) fn function(context: &Context, kernel: Kernel) -> Result<Function, DeviceError> {
    let mut modules = lock(&context.modules);
    if let Some(function) = modules.functions.get(&kernel) {
        return Ok(*function);
    }
    let module = match modules.modules.get(kernel.file) {
        Some(module) => *module,
        None => {
            let module = load_file(context, kernel.file).map_err(|error| error.about(Some(kernel.name)))?;
            modules.modules.insert(kernel.file, module);
            module
        }
    };
    let name = CString::new(kernel.name).expect("a name without a zero byte");
    let mut raw = ptr::null_mut();
    // SAFETY: the module is loaded; the driver writes the handle.
    let call = || unsafe { sys::cuModuleGetFunction(&mut raw, module, name.as_ptr()) };
    context.call_about("find the function", Some(kernel.name), call)?;
    let ask = |attribute| {
        let mut value = 0;
        // SAFETY: the function lives; the driver writes one number.
        let call = || unsafe { sys::cuFuncGetAttribute(&mut value, attribute, raw) };
        context.call_about("ask for an attribute", Some(kernel.name), call)?;
        Ok::<_, DeviceError>(u32::try_from(value).unwrap_or(0))
    };
    let function = Function {
        raw,
        static_shared_bytes: ask(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)? as usize,
        max_threads: ask(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        architecture: ask(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?,
        large_shared: false,
    };
    modules.functions.insert(kernel, function);
    Ok(function)
}

/// Remembers that the function was allowed large shared memory.
pub(super) fn note_large_shared(context: &Context, kernel: Kernel) {
    if let Some(function) = lock(&context.modules).functions.get_mut(&kernel) {
        function.large_shared = true;
    }
}

fn load_file(context: &Context, name: &str) -> Result<sys::CUmodule, DeviceError> {
    let file = FILES.iter().find(|file| file.name == name);
    let file =
        file.ok_or_else(|| DeviceError::refused(LOAD, format!("no kernels/cuda/{name}.cu is embedded")))?;
    if let Some(path) = source::replacement(name) {
        let text = source::compile(&path, context.info.compute_capability)?;
        return load_image(context, text.as_bytes(), Some(&text));
    }
    if let Some(machine_code) = file.machine_code {
        let loaded = load_image(context, machine_code, None);
        if !loaded.as_ref().is_err_and(|error| error.code() == Some(code::NO_BINARY_FOR_GPU)) {
            return loaded;
        }
    }
    let (_, compressed) = choose(file.ptx, context.info.compute_capability)
        .ok_or_else(|| DeviceError::refused(LOAD, format!("kernels/cuda/{name}.cu was never compiled")))?;
    let text = decompress(compressed);
    load_image(context, text.as_bytes(), Some(&text))
}

/// An embedded text, ended by a zero byte. (Compressed it is a tenth as long, and so is what it adds to the program.)
fn decompress(compressed: &[u8]) -> String {
    let mut text = String::new();
    GzDecoder::new(compressed).read_to_string(&mut text).expect("build.rs has read it");
    text + "\0"
}

/// The best PTX for a device: that of its own architecture, else the newest general one it runs.
///
/// An architecture with a letter (`"90a"`) runs on exactly that compute capability, one without on that
/// and every newer one.
fn choose<'a, T>(ptx: &'a [(&'static str, T)], (major, minor): (u32, u32)) -> Option<&'a (&'static str, T)> {
    let own = major * 10 + minor;
    let rank = |architecture: &str| {
        let general = architecture.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        let number: u32 = general.parse().ok()?;
        let specific = general.len() < architecture.len();
        if specific { (number == own).then_some((number, 1)) } else { (number <= own).then_some((number, 0)) }
    };
    ptx.iter().filter(|(architecture, _)| rank(architecture).is_some()).max_by_key(|(name, _)| rank(name))
}

/// Hands an image to the driver: machine code, or the PTX `text`, which ends with a zero byte.
fn load_image(context: &Context, image: &[u8], text: Option<&str>) -> Result<sys::CUmodule, DeviceError> {
    let mut module = ptr::null_mut();
    let mut log = vec![0u8; LOG_BYTES];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG_BYTES as *mut c_void];
    // SAFETY: the image is whole, PTX ends with a zero byte, and the log has the size that is said.
    let loaded = context.call(LOAD, || unsafe {
        let image = image.as_ptr().cast();
        let count = options.len() as u32;
        sys::cuModuleLoadDataEx(&mut module, image, count, options.as_mut_ptr(), values.as_mut_ptr())
    });
    let error = match loaded {
        Ok(()) => return Ok(module),
        Err(error) => error,
    };
    let log: Vec<u8> = log.into_iter().take_while(|byte| *byte != 0).collect();
    let log = String::from_utf8_lossy(&log);
    Err(explain(error, &context.info, text, log.trim()))
}

/// Adds to the driver's refusal of an image what a user can do about it.
fn explain(error: DeviceError, info: &DeviceInfo, ptx: Option<&str>, log: &str) -> DeviceError {
    let Cause::Driver { code, name, text } = error.cause() else { return error };
    let mut text = text.clone();
    match *code {
        code::UNSUPPORTED_PTX_VERSION => {
            let version = ptx.and_then(ptx_version).unwrap_or("unknown");
            let (major, minor) = info.driver;
            let needed = needed_driver(version);
            text += &format!(
                "; the kernels are PTX {version}, which needs {needed}; this driver supports CUDA {major}.{minor}"
            );
        }
        code::INVALID_PTX if !log.is_empty() => text += &format!("; {log}"),
        _ => {}
    }
    DeviceError::new(LOAD, Cause::Driver { code: *code, name: name.clone(), text })
}

/// The version that a PTX text says it has, such as `"8.7"`.
fn ptx_version(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix(".version ")).map(str::trim)
}

/// The driver that takes a version of PTX.
fn needed_driver(version: &str) -> &'static str {
    match version {
        "8.0" | "8.1" | "8.2" | "8.3" | "8.4" | "8.5" => "driver 525 or newer",
        "8.6" | "8.7" => "driver 570 (CUDA 12.8) or newer",
        "8.8" => "driver 575 (CUDA 12.9) or newer",
        "9.0" => "driver 580 (CUDA 13.0) or newer",
        _ => "a newer driver",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen<T>(ptx: &[(&'static str, T)], capability: (u32, u32)) -> Option<&'static str> {
        choose(ptx, capability).map(|(architecture, _)| *architecture)
    }

    #[test]
    fn a_device_gets_its_own_architecture_else_the_general_one() {
        let ptx = [("80", ""), ("90a", ""), ("100a", "")];
        assert_eq!(chosen(&ptx, (8, 0)), Some("80"));
        assert_eq!(chosen(&ptx, (8, 6)), Some("80"));
        assert_eq!(chosen(&ptx, (8, 9)), Some("80"));
        assert_eq!(chosen(&ptx, (9, 0)), Some("90a"));
        assert_eq!(chosen(&ptx, (10, 0)), Some("100a"));
        assert_eq!(chosen(&ptx, (10, 3)), Some("80"));
        assert_eq!(chosen(&ptx, (12, 0)), Some("80"));
        assert_eq!(chosen(&ptx, (7, 5)), None);
    }

    #[test]
    fn among_general_ones_the_newest_that_runs() {
        let ptx = [("80", ""), ("89", ""), ("90", ""), ("90a", "")];
        assert_eq!(chosen(&ptx, (8, 6)), Some("80"));
        assert_eq!(chosen(&ptx, (8, 9)), Some("89"));
        assert_eq!(chosen(&ptx, (9, 0)), Some("90a"));
        assert_eq!(chosen(&ptx, (12, 0)), Some("90"));
    }

    #[test]
    fn every_embedded_file_runs_everywhere_and_ends() {
        assert!(FILES.iter().any(|file| file.name == "probe"));
        for file in FILES {
            assert!(chosen(file.ptx, (8, 0)).is_some(), "{}: no PTX for compute capability 8.0", file.name);
            for (architecture, text) in file.ptx {
                let text = decompress(text);
                assert!(text.contains(".version ") && text.ends_with('\0'), "{} {architecture}", file.name);
            }
        }
    }

    #[test]
    fn the_table_of_resources_is_that_of_the_sources_and_nothing_spills() {
        let Some(sources) = SOURCES else {
            println!("SKIP: PTX is stale");
            return;
        };
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/ptx/resources.csv");
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let columns = lines.next().unwrap();
        let column = |name: &str| columns.iter().position(|column| *column == name).unwrap();
        let rows: Vec<_> = lines.collect();
        for (file, hash) in sources {
            let rows: Vec<_> = rows.iter().filter(|row| row[column("file")] == *file).collect();
            assert!(!rows.is_empty(), "{file} is not in the table: run kernels/cuda/compile.py resources");
            for row in rows {
                let made_for = row[column("sources")];
                assert_eq!(
                    made_for,
                    &hash[..made_for.len()],
                    "{file}: run kernels/cuda/compile.py resources"
                );
                for name in ["stack", "spill_stores", "spill_loads", "ldl", "stl"] {
                    assert_eq!(row[column(name)], "0", "{name} of {} on {}", row[column("kernel")], row[2]);
                }
            }
        }
    }

    #[test]
    fn an_old_driver_is_told_which_one_is_needed() {
        let info = DeviceInfo {
            ordinal: 0,
            name: "Ada".into(),
            compute_capability: (8, 9),
            driver: (12, 2),
            multiprocessors: 1,
            memory_bytes: 0,
            l2_bytes: 0,
            shared_bytes_per_block: 0,
            shared_bytes_per_multiprocessor: 0,
            registers_per_multiprocessor: 0,
            clock_khz: 0,
            memory_clock_khz: 0,
            memory_bus_bits: 0,
        };
        let cause = Cause::Driver {
            code: code::UNSUPPORTED_PTX_VERSION,
            name: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION".into(),
            text: "the provided PTX was compiled with an unsupported toolchain.".into(),
        };
        let ptx = "//\n.version 8.7\n.target sm_80\n\0";
        let error = explain(DeviceError::new(LOAD, cause), &info, Some(ptx), "").about(Some("route"));
        assert_eq!(
            error.to_string(),
            "CUDA: load the file of kernel route: CUDA_ERROR_UNSUPPORTED_PTX_VERSION (the provided PTX was \
             compiled with an unsupported toolchain.; the kernels are PTX 8.7, which needs driver 570 \
             (CUDA 12.8) or newer; this driver supports CUDA 12.2)"
        );
    }
}
