//! Downloads against servers on the loopback device: what is asked for, what is kept, what is refused.

#![cfg(unix)]

#[path = "hub/names.rs"]
mod names;
#[path = "hub/server.rs"]
mod server;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moebius::hub::{Described, HubError, HubOptions, Lines, Progress, Token, describe, fetch};
use serde_json::json;

use server::*;

#[test]
fn a_model_is_downloaded_once_into_the_common_layout() {
    let (cache, server) = (Cache::new(), hub(checkpoint()));
    let folder = cache.get(&server).unwrap();
    assert_eq!(folder, cache.root().join("snapshots").join(COMMIT));
    is_whole(&folder);
    assert_eq!(fs::read_to_string(cache.root().join("refs/main")).unwrap(), COMMIT);
    let blob = format!("../../blobs/{}", sha256(&checkpoint()[SHARDS[0]]));
    assert_eq!(fs::read_link(folder.join(SHARDS[0])).unwrap(), Path::new(&blob));
    let config = format!("../../blobs/{}", git_blob(b"{}"));
    assert_eq!(fs::read_link(folder.join("config.json")).unwrap(), Path::new(&config));
    assert!(server.take().iter().all(|asked| asked.header("authorization").is_none()));
    let other_tool = hf_hub::Cache::new(cache.0.clone()).model("org/name".into());
    assert_eq!(other_tool.get(SHARDS[1]), Some(folder.join(SHARDS[1])));
    assert_eq!(cache.get(&server).unwrap(), folder);
    assert_eq!(server.take().len(), 0, "complete in the cache: nobody is asked");
    let mut options = cache.options(&server);
    options.refresh = true;
    assert_eq!(fetch("org/name", None, &options, &mut ()).unwrap(), folder);
    assert_eq!(server.take().len(), 1, "only the list");
    options.endpoint = "http://127.0.0.1:1".into();
    assert_eq!(fetch("org/name", None, &options, &mut ()).unwrap(), folder, "the hub cannot be reached");
}

/// `plan` asks for two small files; what they describe is neither downloaded nor shown as if it were.
#[test]
fn a_description_is_downloaded_without_its_weights() {
    let (cache, server) = (Cache::new(), hub(checkpoint()));
    let mut options = cache.options(&server);
    let described = describe("org/name", None, &options, &mut ()).unwrap();
    let Described::Files { config, index: Some(index) } = &described else { panic!("{described:?}") };
    assert_eq!(fs::read(config).unwrap(), checkpoint()["config.json"]);
    assert_eq!(fs::read(index).unwrap(), checkpoint()["model.safetensors.index.json"]);
    let asked: Vec<String> = server.take().into_iter().map(|asked| asked.path).collect();
    assert!(asked.iter().all(|path| !path.ends_with(".safetensors")), "{asked:?}");
    assert!(!cache.root().join("snapshots").exists() && !cache.root().join("refs").exists());
    assert_eq!(describe("org/name", None, &options, &mut ()).unwrap(), described);
    assert_eq!(server.take().len(), 1, "only the list");
    options.offline = true;
    let error = describe("org/name", None, &options, &mut ()).unwrap_err();
    assert!(
        matches!(&error, HubError::Offline { missing, .. } if missing.contains("config.json")),
        "{error}"
    );
    // A whole snapshot is used as it is.
    let folder = cache.get(&server).unwrap();
    assert_eq!(describe("org/name", None, &options, &mut ()).unwrap(), Described::Folder(folder));
}

#[test]
fn a_cut_connection_is_continued() {
    let tries = AtomicU32::new(0);
    let server = odd_shard(move |asked, bytes| {
        let mut reply = ranged(asked, bytes);
        reply.cut = (tries.fetch_add(1, Ordering::Relaxed) < 2).then_some(700_000);
        reply
    });
    let cache = Cache::new();
    is_whole(&cache.get(&server).unwrap());
    let asked: Vec<_> = server.take().into_iter().filter(|asked| asked.path.ends_with(SHARDS[0])).collect();
    let ranges: Vec<_> = asked.iter().map(|asked| asked.header("range")).collect();
    assert_eq!(ranges, [None, Some("bytes=700000-"), Some("bytes=1400000-")]);
}

#[test]
fn an_interrupted_download_is_continued_by_the_next_run() {
    let broken = odd_shard(|asked, bytes| Reply { cut: Some(100_000), ..ranged(asked, bytes) });
    let cache = Cache::new();
    let mut options = cache.options(&broken);
    options.retries = 0;
    let error = fetch("org/name", None, &options, &mut ()).unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    assert!(cache.nothing_shown());
    assert_eq!(fs::metadata(cache.partial()).unwrap().len(), 100_000);
    let server = hub(checkpoint());
    is_whole(&cache.get(&server).unwrap());
    assert!(!cache.partial().exists());
    let asked = server.take();
    let shard = asked.iter().find(|asked| asked.path.ends_with(SHARDS[0])).unwrap();
    assert_eq!(shard.header("range"), Some("bytes=100000-"));
    assert!(!asked.iter().any(|asked| asked.path.ends_with("/config.json")), "already there");
}

#[test]
fn any_partial_file_ends_in_the_right_one() {
    let right = checkpoint()[SHARDS[0]].clone();
    let too_long = [right.clone(), vec![0]].concat();
    let wrong_length = vec![9; right.len()];
    for ignores_range in [false, true] {
        for partial in [&right[..1000], &right[..], &too_long[..], &wrong_length[..], b"garbage"] {
            let server = odd_shard(
                move |asked, bytes| if ignores_range { Reply::new(200, bytes) } else { ranged(asked, bytes) },
            );
            let cache = Cache::new();
            cache.put_partial(partial);
            is_whole(&cache.get(&server).unwrap());
        }
    }
}

#[test]
fn wrong_contents_are_never_shown() {
    type Odd = fn(&Asked, &[u8]) -> Reply;
    let cases: [(&str, Odd, u32); 9] = [
        ("checksum", |_, bytes| Reply::new(200, vec![0; bytes.len()]), 1),
        ("bytes where the listing says", |_, bytes| Reply::new(200, &bytes[1..]), 1),
        (
            "bytes where the listing says",
            |_, bytes| Reply { no_length: true, ..Reply::new(200, [bytes, b"x"].concat()) },
            1,
        ),
        ("answer ended after 5 of", |_, bytes| Reply { no_length: true, ..Reply::new(200, &bytes[..5]) }, 2),
        ("another part", |_, bytes| Reply::new(206, bytes).with("content-range", "bytes 7-9/10"), 1),
        ("another part", |_, bytes| Reply::new(206, bytes), 1),
        ("status 503", |_, _| Reply::new(503, "").with("retry-after", "0"), 3),
        ("status 429", |_, _| Reply::new(429, "").with("retry-after", "x"), 3),
        ("status 418", |_, _| Reply::new(418, ""), 1),
    ];
    for (message, odd, at_least) in cases {
        let (cache, server) = (Cache::new(), odd_shard(odd));
        let error = cache.get(&server).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(cache.nothing_shown());
        let asked = server.take().iter().filter(|asked| asked.path.ends_with(SHARDS[0])).count();
        assert!((at_least as usize..=3).contains(&asked), "{message}: {asked} requests");
        is_whole(&cache.get(&hub(checkpoint())).unwrap());
    }
}

#[test]
fn offline_uses_the_cache_or_says_what_is_missing() {
    let (cache, server) = (Cache::new(), hub(checkpoint()));
    let mut offline = cache.options(&server);
    offline.offline = true;
    let miss = |expected: &str| {
        let error = fetch("org/name", None, &offline, &mut ()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("HF_HUB_OFFLINE"), "{error}");
    };
    miss("never downloaded");
    assert_eq!(server.take().len(), 0);
    let folder = cache.get(&server).unwrap();
    server.take();
    assert_eq!(fetch("org/name", None, &offline, &mut ()).unwrap(), folder);
    assert_eq!(fetch("org/name", Some(COMMIT), &offline, &mut ()).unwrap(), folder);
    for (name, message) in [
        (SHARDS[1], "1 of 2 weight files"),
        ("tokenizer.json", "tokenizer.json and tiktoken.model"),
        ("config.json", "config.json is missing"),
        ("model.safetensors.index.json", "are both missing"),
    ] {
        let link = folder.join(name);
        let target = fs::read_link(&link).unwrap();
        fs::remove_file(&link).unwrap();
        miss(message);
        std::os::unix::fs::symlink("../../blobs/gone", &link).unwrap();
        miss(message);
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(target, &link).unwrap();
    }
    fs::write(cache.root().join("refs/main"), "../../../etc").unwrap();
    miss("never downloaded");
    assert_eq!(server.take().len(), 0);
    is_whole(&cache.get(&server).unwrap());
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let files = checkpoint();
    let storage = hub(files.clone());
    let away = format!("{}/org/name/resolve/{COMMIT}/", storage.url);
    let server = Server::new(move |asked| match asked.path.rsplit_once('/') {
        // Inside, outside, and outside by way of inside.
        Some((_, "config.json")) if !asked.path.contains("cache") => {
            Reply::new(307, "").with("location", format!("/cache{}", asked.path))
        }
        Some((_, name)) if name == SHARDS[0] => Reply::new(302, "").with("location", format!("{away}{name}")),
        Some((_, name)) if name == SHARDS[1] => {
            Reply::new(301, "").with("location", format!("/cache/{name}.away"))
        }
        Some((_, name)) if name.ends_with(".away") => {
            Reply::new(302, "").with("location", format!("{away}{}", name.strip_suffix(".away").unwrap()))
        }
        _ => answer(&files, &Asked { path: asked.path.replace("/cache", ""), ..asked.clone() }),
    });
    let cache = Cache::new();
    let mut options = cache.options(&server);
    options.token = Token::new(" hf_secret\n").unwrap();
    assert!(!format!("{options:?}").contains("hf_secret"));
    is_whole(&fetch("org/name", None, &options, &mut ()).unwrap());
    let (here, there) = (server.take(), storage.take());
    assert!(here.iter().all(|asked| asked.header("authorization") == Some("Bearer hf_secret")), "{here:?}");
    assert_eq!(there.len(), 2);
    assert!(there.iter().all(|asked| asked.header("authorization").is_none()), "{there:?}");
    assert!(Token::new("a\r\nHost: evil").is_err());
    assert_eq!(Token::new(" \n").unwrap(), None);
}

#[test]
fn a_chain_of_redirects_that_left_gets_no_token_on_its_way_back() {
    let files = checkpoint();
    let back: Arc<Mutex<String>> = Arc::default();
    let target = back.clone();
    let other = Server::new(move |_| Reply::new(302, "").with("location", target.lock().unwrap().clone()));
    let away = other.url.clone();
    let server = Server::new(move |asked| match asked.path.as_str() {
        path if path.ends_with("/config.json") => Reply::new(302, "").with("location", &away),
        "/back" => Reply::new(200, "{}"),
        _ => answer(&files, asked),
    });
    *back.lock().unwrap() = format!("{}/back", server.url);
    let cache = Cache::new();
    let mut options = cache.options(&server);
    options.token = Token::new("t").unwrap();
    fetch("org/name", None, &options, &mut ()).unwrap();
    let asked = server.take();
    assert_eq!(asked.iter().find(|asked| asked.path == "/back").unwrap().header("authorization"), None);
}

#[test]
fn a_silent_server_is_given_up() {
    let server = Server::new(|_| {
        std::thread::sleep(Duration::from_secs(5));
        Reply::new(200, "")
    });
    let cache = Cache::new();
    let mut options = cache.options(&server);
    (options.timeout, options.retries) = (Duration::from_millis(200), 1);
    let start = std::time::Instant::now();
    assert!(matches!(fetch("org/name", None, &options, &mut ()), Err(HubError::Network { .. })));
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[test]
fn bad_redirects_end() {
    for location in ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "/loop", "//", "http://a b/"] {
        let server = odd_shard(move |asked, _| {
            let to = if location == "/loop" { asked.path.clone() } else { location.to_owned() };
            Reply::new(302, "").with("location", to)
        });
        let cache = Cache::new();
        assert!(matches!(cache.get(&server), Err(HubError::Answer { .. })), "{location}");
        assert!(server.take().len() < 25 && cache.nothing_shown());
    }
}

#[test]
fn refusals_say_what_to_do() {
    for (status, code, token, expected) in [
        (401, "RepoNotFound", false, "set HF_TOKEN"),
        (401, "", true, "refuses the token"),
        (401, "GatedRepo", false, "accept its licence"),
        (403, "GatedRepo", true, "accept its licence"),
        (403, "", true, "right to read"),
        (404, "RepoNotFound", true, "no such repository"),
        (404, "RevisionNotFound", true, "no such revision"),
        (500, "", false, "status 500"),
    ] {
        let server = Server::new(move |_| Reply::new(status, "\x1b[31m<html>").with("x-error-code", code));
        let cache = Cache::new();
        let mut options = cache.options(&server);
        options.token = token.then(|| Token::new("hf_secret").unwrap()).flatten();
        let error = fetch("org/name", None, &options, &mut ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("hf_secret") && !error.contains('\x1b'));
        assert_eq!(server.take().len(), if status == 500 { 3 } else { 1 });
        assert_eq!(fs::read_dir(&cache.0).unwrap().count(), 0);
    }
    let cache = Cache::new();
    let mut options = HubOptions::new(&cache.0);
    (options.endpoint, options.retries) = ("http://127.0.0.1:1".into(), 0);
    assert!(matches!(fetch("org/name", None, &options, &mut ()), Err(HubError::Network { .. })));
    for endpoint in ["", "ftp://x", "x", "http://a b"] {
        options.endpoint = endpoint.into();
        assert!(
            matches!(fetch("org/name", None, &options, &mut ()), Err(HubError::Setting { .. })),
            "{endpoint}"
        );
    }
}

#[test]
fn revisions_are_asked_for_and_kept_apart() {
    let files = checkpoint();
    let server = Server::new(move |asked| match asked.path.strip_prefix("/api/models/org/name/revision/") {
        Some(_) => Reply::new(200, listing(&files)),
        None => answer(&files, asked),
    });
    let cache = Cache::new();
    let options = cache.options(&server);
    for (revision, asked) in [("refs/pr/1", "refs%2Fpr%2F1"), ("v1.0", "v1.0")] {
        is_whole(&fetch("org/name", Some(revision), &options, &mut ()).unwrap());
        assert_eq!(server.take()[0].path, format!("/api/models/org/name/revision/{asked}?blobs=true"));
        assert_eq!(fs::read_to_string(cache.root().join("refs").join(revision)).unwrap(), COMMIT);
    }
    is_whole(&fetch("org/name", Some(COMMIT), &options, &mut ()).unwrap());
    assert_eq!(server.take().len(), 0, "the commit is in the cache");
    let error = fetch("org/name", Some(&COMMIT.replace('0', "f")), &options, &mut ()).unwrap_err();
    assert!(error.to_string().contains("another commit"), "{error}");
    for (repo, revision) in [("org/name", "a/../b"), ("org/name", "/x"), ("../x", "main"), ("a/b/c", "main")]
    {
        assert!(matches!(fetch(repo, Some(revision), &options, &mut ()), Err(HubError::NotAModel { .. })));
    }
}

/// Mirrors list names only; the answers' own headers then tell contents and sizes.
#[test]
fn a_bare_listing_is_enough() {
    let files = checkpoint();
    let server = Server::new(move |asked| {
        if asked.path.starts_with("/api") {
            let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
            return Reply::new(200, json!({"sha": COMMIT, "siblings": siblings}).to_string());
        }
        let bytes = &files[asked.path.rsplit_once('/').unwrap().1];
        let reply = answer(&files, asked).with("etag", format!("W/\"{}\"", git_blob(bytes)));
        if asked.path.ends_with("safetensors") {
            reply.with("x-linked-etag", format!("\"{}\"", sha256(bytes)))
        } else {
            reply
        }
    });
    let cache = Cache::new();
    let folder = cache.get(&server).unwrap();
    is_whole(&folder);
    let blob = format!("../../blobs/{}", sha256(&checkpoint()[SHARDS[0]]));
    assert_eq!(fs::read_link(folder.join(SHARDS[0])).unwrap(), Path::new(&blob));
    for etag in ["../../x", "a/b", "", ".."] {
        let server = Server::new(move |asked| {
            match asked.path.starts_with("/api") {
            true => Reply::new(200, json!({"sha": COMMIT, "siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]}).to_string()),
            false => Reply::new(200, "x").with("etag", etag),
        }
        });
        let cache = Cache::new();
        assert!(cache.get(&server).unwrap_err().to_string().contains("ETag"));
        assert!(cache.nothing_shown());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let (cache, server) = (Cache::new(), hub(checkpoint()));
    fs::create_dir_all(cache.root().join("blobs")).unwrap();
    std::os::unix::fs::symlink("/dev/full", cache.partial()).unwrap();
    let error = cache.get(&server).unwrap_err();
    assert!(matches!(error, HubError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("HF_HUB_CACHE") && cache.nothing_shown());
}

#[test]
fn two_processes_bring_each_file_once() {
    let (cache, server) = (
        Cache::new(),
        odd_shard(|asked, bytes| {
            std::thread::sleep(Duration::from_millis(200));
            ranged(asked, bytes)
        }),
    );
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| is_whole(&cache.get(&server).unwrap()));
        }
    });
    for name in checkpoint().keys().filter(|name| !name.contains('/')) {
        let count = server.take_count(name);
        assert!(count <= 1, "{name}: {count}");
    }
}

#[test]
fn lines_tell_bytes_rate_and_rest() {
    let (cache, server) = (Cache::new(), hub(checkpoint()));
    let mut out = Vec::new();
    fetch("org/name", None, &cache.options(&server), &mut Lines::new(&mut out, Duration::ZERO)).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains(&format!("downloading {}, 2.38 MiB", SHARDS[0])), "{text}");
    assert!(
        text.lines().any(|line| line.starts_with("4.77 MiB of 4.77 MiB") && line.contains("/s")),
        "{text}"
    );
    assert!(text.lines().last().unwrap().starts_with("downloaded 4.77 MiB in"), "{text}");
    let mut bar = moebius::hub::Bar::new();
    bar.total(2);
    bar.position(1);
    bar.finish();
}
