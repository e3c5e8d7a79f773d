//! The `moebius` binary; see [`moebius::cli`].

fn main() -> std::process::ExitCode {
    moebius::cli::main()
}
