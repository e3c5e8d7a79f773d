//! For those who write kernels: compiles them when they are loaded instead of using the embedded ones.
//!
//! `MOEBIUS_CUDA_SOURCE` names the folder of the `.cu` files. It needs NVRTC 12, which is no part of a driver:
//! `LD_LIBRARY_PATH` must name the folder of `libnvrtc.so.12`.

use std::ffi::{CStr, CString, c_char};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result as nvrtc, sys};

use super::error::DeviceError;

/// The variable that names the folder.
const FOLDER: &str = "MOEBIUS_CUDA_SOURCE";
const COMPILE: &str = "compile the file";

/// The source that replaces the embedded kernels of the file `name`, if there is one.
pub(super) fn replacement(name: &str) -> Option<PathBuf> {
    let path = Path::new(&std::env::var_os(FOLDER)?).join(format!("{name}.cu"));
    path.exists().then_some(path)
}

/// PTX for compute capability `major`.`minor`, ended by a zero byte.
pub(super) fn compile(path: &Path, capability: (u32, u32)) -> Result<String, DeviceError> {
    // SAFETY: loads and unloads the library, whose initialisers may run at any time.
    if !catch_unwind(|| unsafe { sys::is_culib_present() }).unwrap_or(false) {
        let reason = format!("{FOLDER} is set, and there is no libnvrtc.so.12 to compile with");
        return Err(DeviceError::unavailable(COMPILE, reason));
    }
    let source = std::fs::read_to_string(path);
    let source = source.map_err(|error| refused(path, &error.to_string()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let options = [
        format!("--gpu-architecture=compute_{}", architecture(&source, capability)),
        "--std=c++17".into(),
        format!("--include-path={}", folder.display()),
    ];
    // A library that lacks a function makes cudarc panic.
    match catch_unwind(|| run(&source, &options)) {
        Ok(ptx) => ptx.map_err(|log| refused(path, &log)),
        Err(_) => Err(refused(path, "this libnvrtc cannot be used")),
    }
}

fn refused(path: &Path, reason: &str) -> DeviceError {
    DeviceError::refused(COMPILE, format!("{}: {}", path.display(), reason.trim()))
}

/// The device's own architecture, with its letter if the source has a path for it.
fn architecture(source: &str, (major, minor): (u32, u32)) -> String {
    let own = source.lines().find_map(|line| line.strip_prefix("// architectures: ")).unwrap_or("");
    let plain = format!("{major}{minor}");
    let special = own.split_whitespace().find(|name| name.strip_prefix(&plain) == Some("a"));
    special.map_or(plain, String::from)
}

/// The text, ended by a zero byte, or what the compiler has against the source.
fn run(source: &str, options: &[String]) -> Result<String, String> {
    let source = CString::new(source).map_err(|error| error.to_string())?;
    let program = nvrtc::create_program(&source, None).map_err(|error| error.to_string())?;
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    // SAFETY: the program lives until it is destroyed below.
    let compiled = unsafe { nvrtc::compile_program(program, &options) };
    // SAFETY: as above.
    let output = unsafe {
        match compiled {
            Ok(()) => nvrtc::get_ptx(program).map(|text| Ok(string(&text) + "\0")),
            Err(error) => {
                nvrtc::get_program_log(program).map(|log| Err(format!("{error}\n{}", string(&log))))
            }
        }
    };
    // SAFETY: destroyed once.
    let _ = unsafe { nvrtc::destroy_program(program) };
    output.map_err(|error| error.to_string())?
}

/// A text of the library up to its zero byte.
fn string(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().map(|byte| *byte as u8).chain([0]).collect();
    let text = CStr::from_bytes_until_nul(&bytes).expect("a zero byte was added");
    text.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_architecture_is_the_devices_own() {
        assert_eq!(architecture("", (8, 6)), "86");
        let source = "// What it is.\n// architectures: 90a 100a\n";
        assert_eq!(architecture(source, (9, 0)), "90a");
        assert_eq!(architecture(source, (10, 0)), "100a");
        assert_eq!(architecture(source, (12, 0)), "120");
    }

    #[test]
    fn without_the_compiler_or_with_a_wrong_source_it_says_so() {
        // Not CUDA: this very file.
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/source.rs");
        let error = compile(&path, (8, 0)).unwrap_err().to_string();
        assert!(error.contains("no libnvrtc.so.12") || error.contains("NVRTC_ERROR_COMPILATION"), "{error}");
    }
}
