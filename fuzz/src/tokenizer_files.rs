//! A tokenizer file, chosen by the first byte.

use moebius::tokenizer::{Specials, Tokenizer};

/// What loads encodes any text to its own ids and says them back.
pub fn run(data: &[u8]) {
    let Some((choice, file)) = data.split_first() else { return };
    let (ranks, config) = (super::ranks(), super::TOKENIZER_CONFIG);
    let read = |name: &str| {
        let bytes = match (choice % 3, name) {
            (0, "tokenizer.json") | (1, "tiktoken.model") | (2, "tokenizer_config.json") => file,
            (2, "tiktoken.model") => ranks.as_bytes(),
            (0 | 1, "tokenizer_config.json") => config.as_bytes(),
            _ => return Ok(None),
        };
        Ok(Some(bytes.to_vec()))
    };
    let Ok(tokenizer) = Tokenizer::load(&read) else { return };
    let input = String::from_utf8_lossy(&file[..file.len().min(200)]);
    for text in ["Hello, <|im_end|> 世界 🦀\r\n  1234 abc", &*input] {
        for specials in [Specials::Plain, Specials::Parse] {
            let Ok(ids) = tokenizer.encode(text, specials) else { continue };
            assert!(
                ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()),
                "an id outside of the vocabulary"
            );
            assert!(
                specials == Specials::Parse || !ids.iter().any(|&id| tokenizer.is_control(id)),
                "a forged control token"
            );
            let mut decoder = tokenizer.decoder(true);
            ids.iter().for_each(|&id| drop(decoder.push(id)));
            drop(tokenizer.decode(&ids, false));
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let bpe = r#"{"added_tokens":[{"id":6,"content":"<|im_end|>","special":true,"lstrip":false,"rstrip":false,"single_word":false,"normalized":false}],
"normalizer":null,"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\p{L}+|\\d{1,3}|\\s+(?!\\S)|."},"behavior":"Isolated","invert":false},
{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
"model":{"type":"BPE","vocab":{"a":0,"b":1,"c":2,"ab":3,"abc":4,"Ġ":5},"merges":["a b",["ab","c"]],"ignore_merges":false,"byte_fallback":false}}"#;
    vec![
        [b"\0", bpe.as_bytes()].concat(),
        [b"\x01", super::ranks().as_bytes()].concat(),
        [b"\x02", super::TOKENIZER_CONFIG.as_bytes()].concat(),
    ]
}
