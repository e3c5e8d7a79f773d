//! Files that are not what their names say, and files of others.

use super::*;

#[test]
fn a_file_cut_or_changed_anywhere_is_a_miss() {
    let scratch = Scratch::new();
    let key = keys(1)[0];
    let mut tested = Tested::open(&scratch, room_for(2));
    tested.save_chain(&[key]);
    let path = scratch.block(key);
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.len() as u64, FILE);
    let cut = (0..whole.len()).map(|length| whole[..length].to_vec());
    let longer = [[&whole[..], b"x"].concat()];
    let flipped = (0..whole.len()).map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
    for bytes in cut.chain(longer).chain(flipped) {
        fs::write(&path, &bytes).unwrap();
        assert_eq!(tested.load(&[key]), 0);
        assert!(!tested.store.contains(key));
        tested.store.settle();
        assert!(!path.exists(), "it was removed");
        assert_eq!(tested.store.counters().bytes, room_for(0));
        let used = tested.store.touch(&[key]);
        assert!(tested.save(key, used, 0));
        assert_eq!(tested.load(&[key]), 1);
    }
}

#[test]
fn a_file_cut_anywhere_is_replaced_after_a_restart() {
    let scratch = Scratch::new();
    let key = keys(1)[0];
    Tested::open(&scratch, room_for(1)).save_chain(&[key]);
    let path = scratch.block(key);
    let whole = fs::read(&path).unwrap();
    for length in (0..whole.len()).chain([whole.len() + 1, 1000]) {
        let mut bytes = whole.clone();
        bytes.resize(length, 0);
        fs::write(&path, &bytes).unwrap();
        let mut tested = Tested::open(&scratch, room_for(10));
        assert!(!tested.store.contains(key), "cut to {length} bytes");
        assert_eq!(tested.load(&[key]), 0);
        assert_eq!(tested.store.counters().bytes, bytes_in(&scratch.dir()));
        tested.save_chain(&[key]);
        assert_eq!(tested.load(&[key]), 1);
        assert_eq!(bytes_in(&scratch.dir()), room_for(1));
    }
}

#[test]
fn a_block_under_another_name_is_a_miss() {
    let scratch = Scratch::new();
    let keys = [BlockKey(1), BlockKey(2)];
    let mut tested = Tested::open(&scratch, room_for(4));
    tested.save_chain(&keys);
    fs::copy(scratch.block(keys[0]), scratch.block(keys[1])).unwrap();
    assert_eq!(tested.load(&keys), 1);
}

#[test]
fn blocks_of_other_models_count_and_leave() {
    let scratch = Scratch::new();
    let keys = keys(6);
    Tested::open(&scratch, room_for(4)).save_chain(&keys[..4]);
    let limit = room_for(4);
    let mut other =
        BlockStore::open(&scratch.dir(), limit, 2 * FILE as usize - HEADER_BYTES, |_| {}).unwrap();
    assert!(!other.contains(keys[0]));
    let used = other.touch(&keys[4..5]);
    assert!(other.save(keys[4], used, 0, |bytes| bytes.fill(1)));
    other.settle();
    assert_eq!(bytes_in(&scratch.dir()), limit);
    drop(other);
    assert_eq!(Tested::open(&scratch, limit).load(&keys[..4]), 2);
}

#[test]
fn files_of_others_stay_and_do_not_count() {
    let scratch = Scratch::new();
    let chain = keys(8);
    Tested::open(&scratch, room_for(3)).save_chain(&chain[..3]);
    let dir = scratch.dir();
    let hex = "ab".repeat(16);
    fs::create_dir_all(dir.join("ab")).unwrap();
    fs::create_dir_all(dir.join("AB")).unwrap();
    fs::create_dir_all(dir.join("other")).unwrap();
    let names = [
        "notes.txt".to_owned(),
        "secret.part".to_owned(),
        "draft.0123456789abcdeg.part".to_owned(),
        format!("{hex}.kv"),
        format!("{hex}.part"),
        format!("ab/{}.kv", &hex[1..]),
        format!("ab/{}.kv", hex.to_uppercase()),
        format!("ab/{hex}.kv.bak"),
        format!("ab/{hex}"),
        format!("ab/{hex}.KV"),
        format!("ab/ac{}.kv", &hex[2..]),
        format!("ab/ac{}.part", &hex[2..]),
        format!("ab/+{}.kv", &hex[1..]),
        format!("AB/{hex}.kv"),
        format!("other/{hex}.kv"),
    ];
    for name in &names {
        fs::write(dir.join(name), [7; 500]).unwrap();
    }
    // On a system that does not tell capitals apart, what is ours may be among them.
    let names: Vec<_> = names.iter().filter(|name| !name.contains(char::is_uppercase)).collect();
    let mut tested = Tested::open(&scratch, room_for(3));
    assert_eq!(tested.store.notice(), None);
    if cfg!(target_os = "linux") {
        assert_eq!(tested.store.counters().bytes, room_for(3));
    }
    tested.save_chain(&chain[3..]);
    assert_eq!(tested.load(&chain[3..6]), 3);
    for name in names {
        assert_eq!(fs::read(dir.join(name)).unwrap(), [7; 500], "{name}");
    }
}

#[test]
fn what_a_crash_left_is_removed_by_the_one_who_may_write() {
    let scratch = Scratch::new();
    let keys = keys(2);
    let mut first = Tested::open(&scratch, room_for(2));
    first.save_chain(&keys[..1]);
    let left = [
        scratch.block(keys[0]).with_extension("part"),
        scratch.dir().join("draft.0123456789abcdef.part"),
        scratch.dir().join("00").join(format!("{:032x}.kv", 9)),
    ];
    fs::create_dir_all(left[2].parent().unwrap()).unwrap();
    left.iter().for_each(|path| fs::write(path, [1; HEADER_BYTES]).unwrap());
    let second = Tested::open(&scratch, room_for(2));
    assert!(second.store.notice().is_some());
    assert!(left.iter().all(|path| path.exists()));
    drop((first, second));
    assert_eq!(Tested::open(&scratch, room_for(2)).load(&keys), 1);
    assert!(!left.iter().any(|path| path.exists()));
    assert_eq!(bytes_in(&scratch.dir()), room_for(1));
}

#[test]
fn a_spoilt_secret_is_named_and_left_alone() {
    for length in [0, 31, 5000] {
        let scratch = Scratch::new();
        let path = scratch.dir().join("secret");
        fs::create_dir_all(scratch.dir()).unwrap();
        fs::write(&path, vec![1; length]).unwrap();
        let error = Tested::open_in(Arc::new(Disk), &scratch, 1 << 20).err().unwrap().to_string();
        assert!(error.contains("secret") && error.contains("remove it"), "{error}");
        assert_eq!(fs::read(&path).unwrap().len(), length);
    }
}

#[test]
fn folders_in_the_way_cost_one_block() {
    let scratch = Scratch::new();
    let keys = keys(80);
    let path = scratch.block(keys[0]);
    fs::create_dir_all(path.join("inside")).unwrap();
    fs::create_dir_all(scratch.block(keys[1]).with_extension("part").join("inside")).unwrap();
    let mut tested = Tested::open(&scratch, 1 << 20);
    assert!(!tested.store.contains(keys[0]));
    let used = tested.store.touch(&[]);
    for key in &keys[..2] {
        assert!(tested.save(*key, used, 0));
        assert!(!tested.store.contains(*key));
        // A failure makes it skip some.
        assert_eq!((0..100).position(|depth| tested.save(keys[79], used, depth)), Some(64));
        fs::remove_file(scratch.block(keys[79])).unwrap();
        assert_eq!(tested.load(&keys[79..]), 0);
    }
    assert_eq!(tested.store.counters().failed_saves, 2);
    assert!(path.join("inside").exists());
}

#[cfg(unix)]
#[test]
fn links_and_pipes_are_not_followed() {
    use std::os::unix::fs::symlink;
    let scratch = Scratch::new();
    let keys = keys(4);
    Tested::open(&scratch, 1 << 20).save_chain(&keys);
    let elsewhere = scratch.0.join("elsewhere");
    fs::rename(scratch.block(keys[0]), &elsewhere).unwrap();
    symlink(&elsewhere, scratch.block(keys[0])).unwrap();
    let mut tested = Tested::open(&scratch, 1 << 20);
    assert_eq!(tested.held(&keys), [false, true, true, true]);

    // The same under a running store, where the index still knows the names.
    let pipe = |path: &Path| {
        fs::remove_file(path).unwrap();
        std::process::Command::new("mkfifo").arg(path).status().is_ok_and(|status| status.success())
    };
    fs::remove_file(scratch.block(keys[1])).unwrap();
    symlink(&elsewhere, scratch.block(keys[1])).unwrap();
    let has_pipe = pipe(&scratch.block(keys[2]));
    if !has_pipe {
        println!("SKIP pipes: no mkfifo here");
    }
    for key in &keys[..3] {
        assert_eq!(tested.load(&[*key]), 0);
    }
    tested.store.settle();
    let before = fs::read(&elsewhere).unwrap();
    if has_pipe {
        assert!(!scratch.block(keys[2]).exists());
        fs::write(scratch.block(keys[2]), b"").unwrap();
        assert!(pipe(&scratch.block(keys[2])));
        // What is in the way of a new file under its first name.
        fs::write(scratch.block(keys[2]).with_extension("part"), b"").unwrap();
        assert!(pipe(&scratch.block(keys[2]).with_extension("part")));
    }
    tested.save_chain(&keys);
    assert_eq!(tested.load(&keys), 4, "our own files took their places");
    assert!(keys.iter().all(|&key| fs::symlink_metadata(scratch.block(key)).unwrap().is_file()));
    assert_eq!(fs::read(&elsewhere).unwrap(), before);
}

#[cfg(unix)]
#[test]
fn linked_folders_and_secrets_are_not_followed() {
    use std::os::unix::fs::symlink;
    let scratch = Scratch::new();
    let key = keys(1)[0];
    let parent = scratch.block(key).parent().unwrap().to_owned();
    Tested::open(&scratch, 1 << 20).save_chain(&[key]);
    let elsewhere = scratch.0.join("elsewhere");
    fs::rename(&parent, &elsewhere).unwrap();
    symlink(&elsewhere, &parent).unwrap();
    let before = bytes_in(&elsewhere);
    let mut tested = Tested::open(&scratch, 1 << 20);
    assert!(!tested.store.contains(key));
    tested.save_chain(&[key]);
    assert!(!tested.store.contains(key));
    assert_eq!(tested.store.counters(), Counters { failed_saves: 1, bytes: 32, ..Counters::default() });
    assert_eq!((bytes_in(&elsewhere), fs::read_dir(&elsewhere).unwrap().count()), (before, 1));
    drop(tested);

    for name in ["lock", "secret"] {
        let target = scratch.0.join(name);
        fs::rename(scratch.dir().join(name), &target).unwrap();
        symlink(&target, scratch.dir().join(name)).unwrap();
        let opened = Tested::open_in(Arc::new(Disk), &scratch, 1 << 20);
        match name {
            "lock" => assert!(opened.unwrap().store.notice().unwrap().contains("lock")),
            _ => assert!(opened.is_err()),
        }
    }
}
