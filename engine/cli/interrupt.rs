//! Ctrl-C as a flag: the first one asks, a second one while the first is unanswered ends the program.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);
static INSTALLED: OnceLock<()> = OnceLock::new();

/// Catches Ctrl-C from now on.
pub fn install() {
    INSTALLED.get_or_init(|| {
        let handler = || {
            if ASKED.swap(true, Ordering::AcqRel) {
                std::process::exit(130);
            }
        };
        if let Err(error) = ctrlc::set_handler(handler) {
            tracing::warn!("Ctrl-C will end the program at once: {error}");
        }
    });
}

/// Whether Ctrl-C was pressed and not taken yet.
pub fn asked() -> bool {
    ASKED.load(Ordering::Acquire)
}

/// Whether Ctrl-C was pressed; forgets it.
pub fn take() -> bool {
    ASKED.swap(false, Ordering::AcqRel)
}
