//! What the system can give this process, and what it has taken: `/proc` and the limits of its control group.

use std::path::{Path, PathBuf};

/// Where version 2 of control groups is mounted, and where version 1 has its memory controller.
const GROUPS: &str = "/sys/fs/cgroup";
const MEMORY_GROUPS: &str = "/sys/fs/cgroup/memory";
/// From here on version 1 means "no limit": the largest count of whole pages.
const NO_LIMIT: usize = 1 << 60;

/// What this process can still have without anything being killed, in bytes: what Linux calls `MemAvailable`, or what
/// the limits of its control group leave where that is less. `None` where the system does not say.
pub fn available_memory() -> Option<usize> {
    let machine = mem_available(&read(Path::new("/proc/meminfo"))?);
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let group = left_in_groups(&groups, Path::new(GROUPS), Path::new(MEMORY_GROUPS));
    machine.into_iter().chain(group).min()
}

/// The most memory this process has had resident, in bytes; 0 where the system does not say.
pub fn peak_resident_bytes() -> usize {
    let text = read(Path::new("/proc/self/status")).unwrap_or_default();
    kib_after(&text, "VmHWM:").unwrap_or(0)
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn mem_available(meminfo: &str) -> Option<usize> {
    kib_after(meminfo, "MemAvailable:")
}

/// The value of a line `NAME 123 kB`, in bytes.
fn kib_after(text: &str, name: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// The least that is left in any group that this process is in, by the lines of `/proc/self/cgroup`.
fn left_in_groups(groups: &str, unified: &Path, memory: &Path) -> Option<usize> {
    let left = groups.lines().flat_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            return Vec::new();
        };
        let names: Option<[&str; 4]> = if controllers.is_empty() {
            Some(["memory.max", "memory.current", "active_file", "inactive_file"])
        } else if controllers.split(',').any(|name| name == "memory") {
            let names = [
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_active_file",
                "total_inactive_file",
            ];
            Some(names)
        } else {
            None
        };
        let root = if controllers.is_empty() { unified } else { memory };
        names.map_or_else(Vec::new, |names| above(root, path).map(|group| left(&group, names)).collect())
    });
    left.flatten().min()
}

/// A group's folder and all above it: limits hold for everything below. Inside a container the path is often the
/// host's and does not exist; the root is then the container's own group.
fn above<'a>(root: &'a Path, path: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != "..").collect();
    (0..=parts.len()).rev().map(move |count| root.join(parts[..count].join("/")))
}

/// What a group's limit leaves: file pages that it holds can be dropped.
fn left(group: &Path, [limit, used, active, inactive]: [&str; 4]) -> Option<usize> {
    let number = |name: &str| read(&group.join(name))?.trim().parse::<usize>().ok();
    let limit = number(limit).filter(|limit| *limit < NO_LIMIT)?;
    let stat = read(&group.join("memory.stat")).unwrap_or_default();
    let pages = |name: &str| {
        let value =
            stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<usize>().ok());
        value.unwrap_or(0)
    };
    let dropped = pages(active).saturating_add(pages(inactive));
    Some(limit.saturating_sub(number(used).unwrap_or(0).saturating_sub(dropped)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_asked() {
        let text = "MemTotal:       32 kB\nMemFree: 1 kB\nMemAvailable:   23306 kB\n";
        assert_eq!(mem_available(text), Some(23306 * 1024));
        assert_eq!(mem_available("MemTotal: 32 kB\n"), None);
        assert_eq!(mem_available("MemAvailable: 99999999999999999999 kB\n"), None);
    }

    #[test]
    fn limits_of_control_groups_count() {
        let root = std::env::temp_dir().join(format!("moebius-groups-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("two/memory.max", "max\n");
        write("two/a/memory.max", "1000000\n");
        write("two/a/memory.current", "400000\n");
        write("two/a/memory.stat", "anon 1\nactive_file 50000\ninactive_file 250000\nfile_dirty 7\n");
        write("two/a/b/memory.max", "max\n");
        write("one/x/memory.limit_in_bytes", "9223372036854771712\n");
        write("one/memory.limit_in_bytes", "500000\n");
        write("one/memory.usage_in_bytes", "600000\n");
        write("one/memory.stat", "active_file 9\ntotal_active_file 0\ntotal_inactive_file 200000\n");
        let left = |groups: &str| left_in_groups(groups, &root.join("two"), &root.join("one"));
        assert_eq!(left("0::/a/b\n"), Some(900_000), "the limit above holds below");
        assert_eq!(left("0::/\n"), None);
        assert_eq!(left("0::/elsewhere/a\n"), None, "the host's path");
        assert_eq!(left("12:cpu:/a\n4:memory,hugetlb:/x\n0::/a\n"), Some(100_000));
        assert_eq!(left("nonsense\n\n0:\n"), None);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
