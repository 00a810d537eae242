//! Cleaning and tokens equal those of the Python libraries that the models were trained with.

use std::path::Path;

use kernels::{Device, Tensor};
use models::text::{MAX_TOKENS, Tokenizer, clean};
use models::weights::write_safetensors;
use proofs::fixture;
use serde_json::Value;

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(path)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn cleaned_texts_and_tokens_equal_the_golden_examples() {
    let tokenizer = Tokenizer::load(&fixture("tokenizer")).unwrap();
    for row in json("tokenizer/examples.json")["rows"].as_array().unwrap() {
        let cleaned = clean(row["text"].as_str().unwrap());
        assert_eq!(cleaned, row["cleaned"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&cleaned).unwrap(), ids(&row["ids"]), "{cleaned}");
        let mut short = tokenizer.encode_up_to(&cleaned, 32).unwrap();
        short.resize(32, 0);
        assert_eq!(short, ids(&row["ids_len32"]), "{cleaned}");
    }
}

/// The tokenizer of `tokenizer.json`, of the `spiece.model` beside it, and of the tensor that single files carry. The
/// sentinels `<extra_id_0>` and on are not in the model file: transformers adds them, and no caption has them.
#[test]
fn a_sentencepiece_file_gives_the_tokens_of_its_tokenizer_json() {
    let folder = tempfile::tempdir().unwrap();
    let carrier = folder.path().join("umt5.safetensors");
    let bytes = std::fs::read(fixture("tokenizer/spiece.model")).unwrap();
    let tensor = Tensor::new(bytes.as_slice(), &Device::Cpu).unwrap();
    write_safetensors(&carrier, [("spiece_model", &tensor)], &Default::default()).unwrap();
    let golden = Tokenizer::load(&fixture("tokenizer/tokenizer.json")).unwrap();
    for file in [fixture("tokenizer/spiece.model"), carrier] {
        let tokenizer = Tokenizer::load(&file).unwrap();
        for row in json("tokenizer/examples.json")["rows"].as_array().unwrap() {
            let cleaned = row["cleaned"].as_str().unwrap();
            if cleaned.contains("<extra_id_") {
                continue;
            }
            assert_eq!(tokenizer.encode(cleaned).unwrap(), ids(&row["ids"]), "{cleaned}");
        }
        for (text, _) in CLEANED {
            let cleaned = clean(text);
            assert_eq!(tokenizer.encode(&cleaned).unwrap(), golden.encode(&cleaned).unwrap(), "{cleaned}");
        }
    }
    // Truncated, or no such file at all: reported, not read.
    for bad in [&bytes[..bytes.len() - 1000], &b"not a model"[..], b""] {
        let path = folder.path().join("spiece.model");
        std::fs::write(&path, bad).unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.contains("spiece.model") && error.contains("fetch it again"), "{error}");
    }
    let tensor = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    let other = folder.path().join("other.safetensors");
    write_safetensors(&other, [("x", &tensor)], &Default::default()).unwrap();
    assert!(Tokenizer::load(&other).unwrap_err().to_string().contains("has no tokenizer"));
}

#[test]
fn a_long_prompt_is_cut_and_still_ends() {
    let tokenizer = Tokenizer::load(&fixture("tokenizer/tokenizer.json")).unwrap();
    let ids = tokenizer.encode(&"a dog runs ".repeat(500)).unwrap();
    assert_eq!((ids.len(), ids[MAX_TOKENS - 1]), (MAX_TOKENS, 1));
}

#[test]
fn a_tokenizer_is_found_in_both_layouts_and_missed_by_name() {
    let official = Tokenizer::load(&fixture("repo_official_a14b")).unwrap();
    let diffusers = Tokenizer::load(&fixture("repo_diffusers_a14b")).unwrap();
    assert_eq!(official.fingerprint(), diffusers.fingerprint());
    // Caches are looked up by it without loading the tokenizer.
    let unread = Tokenizer::fingerprint_at(&fixture("repo_official_a14b"));
    assert_eq!(unread.unwrap(), official.fingerprint());
    let error = Tokenizer::load(Path::new("/nowhere")).unwrap_err().to_string();
    for place in ["/nowhere/tokenizer.json", "/nowhere/google/umt5-xxl/tokenizer.json"] {
        assert!(error.contains(place), "{error}");
    }
}

/// Text and what ftfy 6.3.1 (without its repair of mojibake), `html.unescape` twice and joined white space make of it.
const CLEANED: &[(&str, &str)] = &[
    ("it\u{2019}s \u{201c}fine\u{201d}", "it's \"fine\""),
    ("a &lt; b &amp;amp; c", "a < b & c"),
    ("<b>x &eacute; y</b>\nz &eacute;", "<b>x \u{e9} y</b> z \u{e9}"),
    ("P&EACUTE;REZ &NTILDE;", "P\u{c9}REZ \u{d1}"),
    ("this&not that", "this\u{ac} that"),
    ("&notit; x", "\u{ac}it; x"),
    ("tab\u{1b}[31mred\u{1b}[0m end\u{1b}[", "tabred end["),
    ("\u{feff}bom\u{0}nul", "bomnul"),
    ("e\u{301}", "\u{e9}"),
    ("\u{ff76}\u{ff9e}\u{ff77}", "\u{30ac}\u{30ad}"),
    ("\u{ffe5} 100", "\u{a5} 100"),
    ("caf\u{85} x", "caf\u{2026} x"),
    ("line\u{2028}two\r\nthree\rfour", "line two three four"),
    ("\u{149} \u{1c6}", "'n d\u{17e}"),
    ("&#8217; &#x1F600; &#0; &#128; &#xD800;", "' \u{1f600} \u{fffd} \u{20ac} \u{fffd}"),
    ("&semi; &#59; a", "; ; a"),
    ("half\u{3000}width", "half width"),
    ("\u{200b}zero", "\u{200b}zero"),
    ("a\u{ad}b", "a\u{ad}b"),
    ("&hellip;&nbsp;end", "\u{2026} end"),
    ("&amp;lt;tag&amp;gt;", "<tag>"),
    ("100% &copy 2024", "100% \u{a9} 2024"),
    ("x\u{80}\u{99}y", "x\u{20ac}\u{2122}y"),
    ("\u{fb01}\u{fb04}", "fiffl"),
    ("&AMP; &LT;", "& <"),
    ("\u{ff5e}", "~"),
    ("A\u{30a}", "\u{c5}"),
    ("\u{2060}x", "\u{2060}x"),
    ("\u{1d15e}", "\u{1d157}\u{1d165}"),
    ("&#38;#38;", "&"),
    ("&ZWJ;", "\u{200d}"),
    ("\u{1160}\u{ffa0}", "\u{1160}\u{1160}"),
    ("&fjlig; &NotEqualTilde;", "fj \u{2242}\u{338}"),
    ("&bogus; &#xZZ; &#; &;", "&bogus; &#xZZ; &#; &;"),
    ("q &quot;quoted&quot;", "q \"quoted\""),
    ("a\u{b}b\u{c}c\u{1c}d", "ab cd"),
    ("&#x3C;b&#x3E; &eacute;", "<b> \u{e9}"),
    ("&lt;b&gt; \n &eacute &amp;eacute;", "<b> \u{e9} \u{e9}"),
];

#[test]
fn odd_texts_are_cleaned_as_ftfy_cleans_them() {
    for (text, expected) in CLEANED {
        assert_eq!(clean(text), *expected, "{text:?}");
    }
}

/// The library panics over a decoder that is not JSON; decoding is not needed here.
#[test]
fn a_broken_decoder_in_a_tokenizer_is_refused_or_not_needed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let whole = std::fs::read_to_string(fixture("tokenizer/tokenizer.json")).unwrap();
    let at = whole.find("\"decoder\"").unwrap();
    let open = at + whole[at..].find('{').unwrap() + 1;
    for broken in [":", "\"type\":}", "\"x\":[[[,"] {
        std::fs::write(&path, format!("{}{broken}{}", &whole[..open], &whole[open..])).unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("fetch it again"), "{error}");
    }
    std::fs::write(&path, format!("{}\"type\":7,{}", &whole[..open], &whole[open..])).unwrap();
    let golden = Tokenizer::load(&fixture("tokenizer/tokenizer.json")).unwrap();
    let text = "a fox in the snow";
    assert_eq!(Tokenizer::load(&path).unwrap().encode(text).unwrap(), golden.encode(text).unwrap());
}
