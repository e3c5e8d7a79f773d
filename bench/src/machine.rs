//! What a result was measured on: the line that every CSV carries.

use std::time::{SystemTime, UNIX_EPOCH};

/// The machine, as far as the system tells.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Name of the processor, and what it has of the instructions that matter here.
    pub cpu: String,
    /// Cores this process may use.
    pub cores: usize,
    /// Memory of the machine, in bytes; 0 where unknown.
    pub memory_bytes: u64,
    /// Version of the kernel.
    pub kernel: String,
    /// Day of the measurement, UTC.
    pub date: String,
    /// What else computed: a device with its driver and clocks.
    pub device: Option<String>,
}

impl Machine {
    /// Asks the system.
    pub fn detect() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|n| n.trim() == name));
            line.and_then(|line| line.split(':').nth(1)).map_or("?", str::trim)
        };
        let flags: Vec<&str> = field("flags").split(' ').collect();
        let known = [
            "avx2",
            "avx512f",
            "avx512_vnni",
            "avx512_bf16",
            "avx_vnni",
            "amx_bf16",
            "amx_int8",
            "asimd",
            "sve",
        ];
        let has: Vec<&str> = known.into_iter().filter(|name| flags.contains(name)).collect();
        let (family, model) = (field("cpu family"), field("model"));
        let cpu = format!("{} (family {family} model {model}; {})", field("model name"), has.join(" "));
        let total =
            meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        let kib: u64 = total.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0);
        let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400);
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_bytes: kib * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            date: date(days as i64),
            device: None,
        }
    }

    /// All of it in one line, with the version of the program.
    pub fn line(&self) -> String {
        let Self { cpu, cores, memory_bytes, kernel, date, device } = self;
        let device = device.as_ref().map_or_else(String::new, |device| format!("{device}; "));
        let (gib, version) = (*memory_bytes as f64 / (1u64 << 30) as f64, env!("CARGO_PKG_VERSION"));
        format!(
            "machine: {device}{cpu}; {cores} cores; {gib:.1} GiB; Linux {kernel}; moebius {version}; {date}"
        )
    }
}

/// `year-month-day` of a day counted from 1970-01-01 (Gregorian; the algorithm counts from a 1 March).
fn date(days: i64) -> String {
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (year + era * 400, if month < 10 { month + 3 } else { month - 9 });
    format!("{:04}-{month:02}-{day:02}", year + i64::from(month <= 2))
}

/// Memory that this process holds now and the most it has held, in bytes; 0 where the system does not say.
pub fn resident_bytes() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    (field("VmRSS:"), field("VmHWM:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(19_782), "2024-02-29");
        assert_eq!(date(20_819), "2027-01-01");
    }
}
