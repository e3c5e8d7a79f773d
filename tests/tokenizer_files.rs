//! Tokenizer files as they should not be, and as other families write them.

use std::time::Instant;

use moebius::tokenizer::{Specials, Tokenizer, TokenizerError};
use serde_json::{Map, Value, json};

type File = Option<Vec<u8>>;

/// All single bytes, then `more`.
fn ranks(more: &str) -> String {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let line = |byte: u32| {
        let (high, low) = (digits[(byte >> 2) as usize] as char, digits[(byte << 4 & 63) as usize] as char);
        format!("{high}{low}== {byte}\n")
    };
    (0..256).map(line).collect::<String>() + more
}

fn from_files(files: &[(&str, &str)]) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::load(&|name| {
        Ok(files.iter().find(|file| file.0 == name).map(|file| file.1.as_bytes().to_vec()))
    })
}

#[test]
fn malformed_rank_files_name_the_line() {
    assert!(from_files(&[("tiktoken.model", &ranks("YWI= 256\n"))]).is_ok());
    let cases = [
        ("YWI= 257\n", None, "rank 256 is missing"),
        ("YWI= 255\n", Some(257), "rank 255 appears twice"),
        ("YQ== 256\n", Some(257), "appears twice"),
        ("YWI= 256\n\nYW*= 257\n", Some(259), "not base64"),
        ("YWI 256\n", Some(257), "length"),
        ("YWJ= 256\n", Some(257), "left over"),
        (" 256\n", Some(257), "length"),
        ("YWI=\n", Some(257), "no rank"),
        ("YWI= \n", Some(257), "not a number"),
        ("YWI= -1\n", Some(257), "not a number"),
        ("YWI= 4294967296\n", Some(257), "larger"),
        ("YWI= 2147483649\n", Some(257), "larger"),
        ("YWI= 99999999999999999999\n", Some(257), "larger"),
    ];
    for (more, at, why) in cases {
        match from_files(&[("tiktoken.model", &ranks(more))]) {
            Err(TokenizerError::File { file, line, why: said }) => {
                assert_eq!((file.as_str(), line), ("tiktoken.model", at), "{more:?}: {said}");
                assert!(said.contains(why), "{more:?}: {said}");
            }
            other => panic!("{more:?}: {other:?}"),
        }
    }
    let huge = ranks(&format!("{} 256\n", "A".repeat(1 << 20)));
    assert!(from_files(&[("tiktoken.model", &huge)]).unwrap_err().to_string().contains("line 257: line of"));
    assert!(
        from_files(&[("tiktoken.model", "")])
            .unwrap_err()
            .to_string()
            .contains("no token for the single byte")
    );
    assert_eq!(from_files(&[]).unwrap_err(), TokenizerError::Missing);
    let read: &dyn Fn(&str) -> Result<File, String> = &|_| Err("no permission".to_owned());
    assert!(matches!(Tokenizer::load(read), Err(TokenizerError::Read { .. })));
}

#[test]
fn malformed_configurations_are_refused() {
    let model = ranks("YWI= 256\n");
    let listed = |text: &str| {
        let config = format!("{{\"added_tokens_decoder\": {text}}}");
        from_files(&[("tiktoken.model", &model), ("tokenizer_config.json", &config)])
    };
    let token = |id: u64| format!("{{\"{id}\": {{\"content\": \"<x>\", \"special\": true}}}}");
    assert_eq!(listed(&token(257)).unwrap().vocab_size(), 258);
    assert_eq!(listed(&token(260)).unwrap().special_id("<|reserved_token_258|>"), Some(258));
    for text in [
        token(256),
        token(600),
        token(1 << 22),
        token(1 << 31),
        token(1 << 40),
        "[]".into(),
        "{\"x\": {}}".into(),
        "{\"257\": 1}".into(),
        "{\"257\": {\"content\": \"\"}}".into(),
        "{\"-1\": {\"content\": \"x\"}}".into(),
    ] {
        assert!(listed(&text).is_err(), "{text}");
    }
}

#[test]
fn hostile_tokenizer_json_is_refused() {
    let model = |model: &str| from_files(&[("tokenizer.json", &format!("{{\"model\": {model}}}"))]);
    let bpe = r#"{"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}"#;
    assert_eq!(model(bpe).unwrap().encode("ab", Specials::Parse).unwrap(), [2]);
    let cases = [
        r#"{"type": "BPE", "vocab": {"a": 4194304}, "merges": []}"#,
        r#"{"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}"#,
        r#"{"type": "BPE", "vocab": {"a": -1}, "merges": []}"#,
        r#"{"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}"#,
        r#"{"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}"#,
        r#"{"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}"#,
        r#"{"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}"#,
        r#"{"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}"#,
        r#"{"type": "nonsense"}"#,
        "null",
    ];
    for case in cases {
        let error = model(case).expect_err(case);
        assert!(error.to_string().starts_with("tokenizer.json"), "{error}");
    }
    for text in ["", "{}", "[]", "{\"model\"", "\u{0}", &"[".repeat(100_000)] {
        assert!(from_files(&[("tokenizer.json", text)]).is_err());
    }
    let bad_regex = format!(
        "{{\"pre_tokenizer\": {{\"type\": \"Split\", \"pattern\": {{\"Regex\": \"(\"}}, \"behavior\": \"Isolated\", \"invert\": false}}, \"model\": {bpe}}}"
    );
    assert!(from_files(&[("tokenizer.json", &bad_regex)]).is_err());
}

/// A SentencePiece-like vocabulary as Mixtral ships it, in its two published layouts.
fn metaspace(layout: &str) -> Tokenizer {
    let mut vocab = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    vocab.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend(["▁", "a", "b", "h", "i", "▁h", "▁hi", "▁a"].map(str::to_owned));
    let vocab: Map<String, Value> =
        vocab.into_iter().zip(0u32..).map(|(token, id)| (token, id.into())).collect();
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false});
    let (normalizer, pre_tokenizer) = match layout {
        "legacy" => (
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
            Value::Null,
        ),
        _ => (
            Value::Null,
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}),
        ),
    };
    let file = json!({
        "version": "1.0", "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": ["▁ h", "▁h i", "▁ a"]},
    });
    from_files(&[("tokenizer.json", &file.to_string())]).unwrap()
}

#[test]
fn sentencepiece_spaces_and_bytes() {
    for (layout, after_special) in [("legacy", "▁hi"), ("first", "hi")] {
        let tokenizer = metaspace(layout);
        let ids = tokenizer.encode("<s>hi hi 中</s>", Specials::Parse).unwrap();
        let spelt: Vec<String> = ids
            .iter()
            .map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id).unwrap()).into_owned())
            .collect();
        assert_eq!(spelt.first().map(String::as_str), Some("<s>"));
        assert_eq!(spelt[1..].concat().starts_with(' '), after_special == "▁hi", "{layout}: {spelt:?}");
        assert_eq!(ids[ids.len() - 4..], [3 + 0xe4, 3 + 0xb8, 3 + 0xad, 2]);

        let ids = tokenizer.encode("hi hi", Specials::Plain).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), "hi hi");
        // A continuation keeps the space of its first token.
        let mut decoder = tokenizer.decoder(true);
        assert_eq!(ids.iter().map(|&id| decoder.push(id)).collect::<String>(), " hi hi");
        let mut decoder = tokenizer.decoder(true);
        let pushed: Vec<String> = [3 + 0xe4, 3 + 0xb8, 3 + 0xad, 2].map(|id| decoder.push(id)).into();
        assert_eq!(pushed, ["", "", "中", ""]);
        assert_eq!(decoder.push(3 + 0xe4) + &decoder.finish(), "\u{fffd}");
        // Control strings as text take no control ids, though the vocabulary has them.
        let plain = tokenizer.encode("<s>a</s>", Specials::Plain).unwrap();
        assert!(plain.iter().all(|&id| !tokenizer.is_control(id)));
        // Without a pre-tokeniser the whole text is one piece.
        let limit_seconds = if cfg!(debug_assertions) { 120.0 } else { 2.0 };
        for text in ["a".repeat(300_000), "hi ".repeat(100_000), " ".repeat(300_000), "中".repeat(100_000)] {
            let start = Instant::now();
            tokenizer.encode(&text, Specials::Parse).unwrap();
            assert!(start.elapsed().as_secs_f64() < limit_seconds, "{layout}");
        }
    }
}

#[test]
fn runs_of_spaces_are_text_in_every_mode() {
    let file = json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 4, "content": "  ", "special": false, "normalized": true, "lstrip": false, "rstrip": false, "single_word": false},
            {"id": 5, "content": "<e>", "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "<": 1, "e": 2, ">": 3, "  ": 4, "<e>": 5, "Ġ": 6}, "merges": []},
    });
    let tokenizer = from_files(&[("tokenizer.json", &file.to_string())]).unwrap();
    assert_eq!(tokenizer.encode("a  a<e> ", Specials::Parse).unwrap(), [0, 4, 0, 5, 6]);
    assert_eq!(tokenizer.encode("a  a<e>", Specials::Plain).unwrap(), [0, 4, 0, 1, 2, 3]);
    assert_eq!(tokenizer.decode(&[0, 4, 0, 5, 6], true), "a  a ");
    assert_eq!(tokenizer.specials().collect::<Vec<_>>(), [(5, "<e>")]);
}
