//! Writes every target's seeds to `corpus/<target>/`, where libFuzzer looks for them.

use std::path::Path;

fn main() -> std::io::Result<()> {
    for (name, _, seeds) in moebius_fuzz::TARGETS {
        let folder = Path::new("corpus").join(name);
        std::fs::create_dir_all(&folder)?;
        for (number, seed) in seeds().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
