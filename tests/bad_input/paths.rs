//! What stands where a file should be: nothing, folders, pipes, links.
#![cfg(unix)]

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::tiny::{self, Folder, Tiny};

/// A pipe that nobody writes to.
fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn only_regular_files_are_read() {
    let tiny = Tiny::new(tiny::mixtral());
    let optional = ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"];
    let needed = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"];
    for name in needed.into_iter().chain(optional) {
        let folder = tiny.folder();
        let path = folder.path().join(name);
        let mut sockets = Vec::new();
        let kinds: [(&str, &mut dyn FnMut()); 3] = [
            ("a folder", &mut || std::fs::create_dir(&path).unwrap()),
            ("a pipe", &mut || pipe(&path)),
            ("a socket", &mut || sockets.push(UnixListener::bind(&path).unwrap())),
        ];
        for (kind, make) in kinds {
            let _ = std::fs::remove_file(&path);
            make();
            let place = folder.path().to_str().unwrap();
            println!("{name} is {kind}");
            tiny::moebius(&["check", place]).fails(1, &[name, "is not a regular file"]);
            let _ = std::fs::remove_dir(&path);
        }
    }
}

#[test]
fn what_is_missing_is_named() {
    let folder = Folder::new();
    tiny::refuses(&folder, &["config.json: is missing in"]);
    folder.write("config.json", tiny::mixtral().to_string());
    tiny::refuses(&folder, &["model.safetensors: is missing in", "pickles are never read"]);
    folder
        .write("pytorch_model.bin", "pickle")
        .write("consolidated.00.pth", "pickle")
        .write("run.py", "exit(1)");
    tiny::refuses(
        &folder,
        &["model.safetensors: is missing in", ".bin, .pt and other pickles are never read"],
    );
    folder.write("model.safetensors.index.json", r#"{"weight_map": {"a": "pytorch_model.bin"}}"#);
    tiny::refuses(&folder, &["shard \"pytorch_model.bin\" is not a .safetensors file"]);
    let file = folder.path().join("config.json");
    tiny::moebius(&["inspect", file.to_str().unwrap()]).fails(1, &["neither a checkpoint folder"]);
    tiny::moebius(&["inspect", "/nonexistent/folder"]).fails(1, &["/nonexistent/folder"]);
}

#[test]
fn links_do_not_leave_the_folder() {
    let tiny = Tiny::new(tiny::mixtral());
    let outside = tiny.folder();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let folder = tiny.folder();
        let path = folder.path().join(name);
        let place = folder.path().to_str().unwrap();
        let targets = [
            (outside.path().join(name), "is a link out of the folder, to"),
            ("/etc/passwd".into(), "is a link out of the folder, to /etc/passwd"),
            ("/dev/zero".into(), "is a link out of the folder, to /dev/zero"),
            (path.clone(), "symbolic links"),
            ("nothing".into(), ""),
        ];
        for (target, words) in targets {
            std::fs::remove_file(&path).unwrap();
            symlink(&target, &path).unwrap();
            tiny::moebius(&["check", place]).fails(1, &["error: ", words]);
        }
        // Within the folder a link is as good as its file.
        std::fs::remove_file(&path).unwrap();
        std::fs::copy(outside.path().join(name), folder.path().join("real")).unwrap();
        symlink("real", &path).unwrap();
        tiny::open(&folder).unwrap();
    }
}

#[test]
fn the_layout_of_the_hubs_cache_is_followed() {
    let tiny = Tiny::new(tiny::mixtral());
    let root = Folder::new();
    let repo = root.path().join("models--org--name");
    let (blobs, snapshot) = (repo.join("blobs"), repo.join("snapshots/0123abcd"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    let files = [("model.safetensors", tiny.shard()), ("config.json", tiny.config.to_string().into_bytes())];
    for (number, (name, bytes)) in files.into_iter().enumerate() {
        std::fs::write(blobs.join(number.to_string()), bytes).unwrap();
        symlink(format!("../../blobs/{number}"), snapshot.join(name)).unwrap();
    }
    let place = snapshot.to_str().unwrap();
    tiny::moebius_unlimited(&["inspect", place]).succeeds();

    let config = snapshot.join("config.json");
    let relink = |target: &str| {
        std::fs::remove_file(&config).unwrap();
        symlink(target, &config).unwrap();
        tiny::moebius(&["inspect", place])
    };
    std::fs::write(repo.join("config.json"), tiny.config.to_string()).unwrap();
    relink("../../config.json").fails(1, &["config.json: is a link out of the folder"]);
    relink("../../blobs/../config.json").fails(1, &["config.json: is a link out of the folder"]);
    symlink("/etc/passwd", blobs.join("2")).unwrap();
    relink("../../blobs/2").fails(1, &["config.json: is a link out of the folder"]);
    relink("../../blobs").fails(1, &["config.json: is not a regular file"]);
    pipe(&blobs.join("3"));
    relink("../../blobs/3").fails(1, &["config.json: is not a regular file"]);
}
