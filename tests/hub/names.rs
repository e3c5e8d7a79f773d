//! What a model, a repository, a listing, an index and the environment may say.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use moebius::hub::{HubError, HubOptions, ModelRef, Token};
use proptest::prelude::*;
use serde_json::json;

use super::server::*;

#[test]
fn hostile_file_names_stop_everything() {
    let long = "x".repeat(2000);
    let deep = "d/".repeat(40) + "x";
    let names = [
        "../x", "/etc/x", "a\\b", "..%2f", "a/../b", "a//b", "a/", "./a", "C:x", "a/c:/b", "a\0b", "a\nb",
        "", "..", &long, &deep,
    ];
    for name in names {
        let mut files = checkpoint();
        files.insert(name.to_owned(), b"x".to_vec());
        let (cache, server) = (Cache::new(), hub(files));
        let error = cache.get(&server).unwrap_err();
        assert!(matches!(error, HubError::HostileName { .. }), "{name:?}: {error}");
        assert!(!error.to_string().contains(['\0', '\n']));
        assert_eq!(fs::read_dir(&cache.0).unwrap().count(), 0, "something was written");
        assert_eq!(server.take().len(), 1);
    }
}

#[test]
fn an_index_names_plain_files_that_exist() {
    let map = |shard: &str| json!({"weight_map": {"a": shard}}).to_string();
    let many: serde_json::Map<_, _> =
        (0..5000).map(|i| (i.to_string(), json!(format!("m{i}.safetensors")))).collect();
    let cases = [
        (map("../x.safetensors"), "in the same folder"),
        (map("/x.safetensors"), "in the same folder"),
        (map("a/x.safetensors"), "in the same folder"),
        (map("pytorch_model.bin"), "in the same folder"),
        (map(".x.safetensors"), "in the same folder"),
        (map("absent.safetensors"), "names absent.safetensors"),
        (json!({"weight_map": {}}).to_string(), "no weight files"),
        (json!({"weight_map": many}).to_string(), "more than 4096"),
        (json!({"weight_map": {"a": 1}}).to_string(), "index.json"),
        ("[".repeat(100_000), "index.json"),
        (String::new(), "index.json"),
    ];
    for (index, message) in cases {
        let mut files = checkpoint();
        files.insert("model.safetensors.index.json".into(), index.into_bytes());
        let cache = Cache::new();
        let error = cache.get(&hub(files)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(cache.nothing_shown());
    }
}

#[test]
fn repositories_that_cannot_run_say_why() {
    let without = |names: &[&str], extra: &str| {
        let mut files = checkpoint();
        files.retain(|name, _| !names.iter().any(|end| name.ends_with(end)));
        files.insert(extra.to_owned(), b"x".to_vec());
        Cache::new().get(&hub(files)).unwrap_err().to_string()
    };
    assert!(without(&["config.json"], "q4.gguf").contains(".gguf files"));
    assert!(without(&[".index.json"], "x.bin").contains("execute code"));
    let mut single = checkpoint();
    single.retain(|name, _| !name.contains("safetensors"));
    single.insert("model.safetensors".into(), b"weights".to_vec());
    let folder = Cache::new().get(&hub(single)).map(|folder| folder.file_name().unwrap().to_owned());
    assert_eq!(folder.unwrap(), COMMIT);
}

#[test]
fn malformed_listings_are_errors() {
    let mut small = checkpoint();
    small.retain(|name, _| name == "config.json");
    let whole = listing(&small);
    for end in 0..whole.len() {
        let text = whole[..end].to_owned();
        let error = Cache::new().get(&Server::new(move |_| Reply::new(200, text.clone()))).unwrap_err();
        assert!(matches!(error, HubError::Answer { .. }), "{error}");
    }
    let many: Vec<_> = (0..50_001).map(|i| json!({"rfilename": i.to_string()})).collect();
    for text in [
        json!({"sha": "../x", "siblings": []}).to_string(),
        json!({"sha": COMMIT, "siblings": many}).to_string(),
        " ".repeat(33 << 20),
    ] {
        let error = Cache::new().get(&Server::new(move |_| Reply::new(200, text.clone()))).unwrap_err();
        assert!(matches!(error, HubError::Answer { .. }), "{error}");
    }
}

#[test]
fn the_environment_is_read_as_other_tools_read_it() {
    let home = Cache::new();
    let file = |name: &str, text: &str| {
        fs::write(home.0.join(name), text).unwrap();
        home.0.join(name).to_str().unwrap().to_owned()
    };
    let at = home.0.to_str().unwrap().to_owned();
    let read = |vars: &[(&str, &str)]| {
        let vars: BTreeMap<String, OsString> =
            vars.iter().map(|&(name, value)| (name.into(), value.into())).collect();
        HubOptions::from_vars(&|name| vars.get(name).cloned())
    };
    let cache = |vars: &[(&str, &str)]| read(vars).unwrap().cache;
    assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/y")]), Path::new("/h/y/hub"));
    assert_eq!(cache(&[("HF_HOME", "/y"), ("HUGGINGFACE_HUB_CACHE", "/o")]), Path::new("/o"));
    assert_eq!(cache(&[("HF_HUB_CACHE", "/n"), ("HUGGINGFACE_HUB_CACHE", "/o")]), Path::new("/n"));
    assert_eq!(cache(&[("HF_HUB_CACHE", ""), ("HF_HOME", "/y")]), Path::new("/y/hub"));
    assert!(matches!(read(&[]), Err(HubError::Setting { .. })));
    let token = |vars: &[(&str, &str)]| read(&[&[("HF_HOME", at.as_str())], vars].concat()).unwrap().token;
    let is = |text: &str| Token::new(text).unwrap();
    assert_eq!(token(&[]), None);
    file("token", "from-file\n");
    let other = file("other", "from-path");
    assert_eq!(token(&[]), is("from-file"));
    assert_eq!(token(&[("HF_TOKEN_PATH", &other)]), is("from-path"));
    assert_eq!(token(&[("HF_TOKEN_PATH", &other), ("HUGGING_FACE_HUB_TOKEN", "b")]), is("b"));
    assert_eq!(token(&[("HUGGING_FACE_HUB_TOKEN", "b"), ("HF_TOKEN", "a")]), is("a"));
    for (name, value, expected) in [
        ("HF_HUB_OFFLINE", "1", true),
        ("TRANSFORMERS_OFFLINE", "yes", true),
        ("HF_HUB_OFFLINE", "True", true),
        ("HF_HUB_OFFLINE", "0", false),
    ] {
        assert_eq!(read(&[("HOME", "/h"), (name, value)]).unwrap().offline, expected);
    }
    assert_eq!(read(&[("HOME", "/h"), ("HF_ENDPOINT", "http://h/x/")]).unwrap().endpoint, "http://h/x");
    assert_eq!(read(&[("HOME", "/h")]).unwrap().endpoint, "https://huggingface.co");
}

#[test]
fn a_model_is_a_path_or_demo_or_a_hub_id() {
    let folder = Cache::new();
    let file = |name: &str| {
        fs::write(folder.0.join(name), "x").unwrap();
        folder.0.join(name)
    };
    let parse = |path: &Path| ModelRef::parse(path.to_str().unwrap());
    assert_eq!(parse(&folder.0).unwrap(), ModelRef::Folder(folder.0.clone()));
    let gguf = file("m.GGUF");
    assert_eq!(parse(&gguf).unwrap(), ModelRef::Gguf(gguf));
    assert!(parse(&file("x.bin")).is_err());
    assert_eq!(ModelRef::parse("demo").unwrap(), ModelRef::Demo);
    let hub = |repo: &str, revision: Option<&str>| ModelRef::Hub {
        repo: repo.into(),
        revision: revision.map(Into::into),
    };
    assert_eq!(ModelRef::parse("Qwen/Qwen3-30B_A3B.v2").unwrap(), hub("Qwen/Qwen3-30B_A3B.v2", None));
    assert_eq!(ModelRef::parse("a/b@refs/pr/3").unwrap(), hub("a/b", Some("refs/pr/3")));
    let long = format!("a/{}", "b".repeat(97));
    for text in [
        "",
        "foo",
        "a/b/c",
        "a/",
        "/b",
        "a/b@",
        "a/b@..",
        "a/../b",
        "../a",
        "a/.b",
        ".a/b",
        "a%2f/b",
        "a\\b",
        "a/b\0",
        "a/b c",
        "ä/b",
        "a--b/c",
        "./none",
        "~/x",
        "none.gguf",
        "a/b.gguf",
        "a/b@x@y",
        "a/-b",
        &long,
    ] {
        let error = ModelRef::parse(text).unwrap_err();
        assert!(matches!(error, HubError::NotAModel { .. }));
        assert!(!error.to_string().contains('\0'));
    }
}

proptest! {
    /// Whatever is accepted names one folder below the cache.
    #[test]
    fn accepted_ids_are_harmless(text in "[a-zA-Z0-9./@_%\\\\-]{0,30}|.{0,20}") {
        if let Ok(ModelRef::Hub { repo, revision }) = ModelRef::parse(&text) {
            let path = format!("{repo}/{}", revision.unwrap_or_default());
            prop_assert!(!path.contains("..") && !path.starts_with('/') && path.is_ascii());
            prop_assert_eq!(repo.matches('/').count(), 1);
        }
    }
}
