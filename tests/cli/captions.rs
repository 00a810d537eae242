//! `tandem captions`: what each clip is trained with, and what is odd about it.

use crate::desk::Desk;

#[test]
fn captions_are_listed_with_what_is_odd_about_them() {
    let desk = Desk::new();
    for name in ["c", "d"] {
        std::fs::copy(desk.path("clips/a.gif"), desk.path(&format!("clips/{name}.gif"))).unwrap();
    }
    desk.write("clips/c.txt", "a drifting cloud");
    desk.write("clips/d.txt", format!("SKS, {}", "grey, ".repeat(300)));
    desk.change("[data]", "[data]\ntrigger = \"sks cloud\"\nheld_out = [\"b*\"]\nrepeats = { \"a*\" = 3 }");
    let told = desk.succeed(&["captions", "recipe.toml"]).stdout;
    for words in [
        "a.gif (3 samples an epoch)\n  sks cloud, a drifting cloud\n",
        "b.mp4 (held out)",
        "with the same caption, \"sks cloud, a drifting cloud\" (2): a.gif, c.gif",
        "with words of \"sks cloud\" in their captions (4): a.gif, b.mp4, c.gif, d.gif",
        "with more than the 512 tokens that the model sees: d.gif (",
    ] {
        assert!(told.contains(words), "{words}\n{told}");
    }
    desk.change(
        "folder = \"clips\"",
        "folder = \"clips\"\ncaptions = { shuffle_tags = true, arrangements = 5 }",
    );
    let told = desk.succeed(&["captions", "recipe.toml", "--json", "--set", "data.trigger=cloud"]).stdout;
    let object: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    let texts = object["clips"][0]["texts"].as_array().unwrap();
    assert_eq!(texts.len(), 1, "one tag has one arrangement: {texts:?}");
    assert_eq!(object["findings"]["with_trigger"], serde_json::json!(["a.gif", "b.mp4", "c.gif"]));
    // One text of a and c, one of b, the caption of d and up to five arrangements of it.
    let count = object["texts"]["count"].as_u64().unwrap();
    assert!((4..=8).contains(&count), "{object}");
    desk.change("shuffle_tags = true, arrangements = 5", "keep_tags = 2");
    desk.refuse(&["captions", "recipe.toml"], &["data.captions", "keep_tags only has a meaning"]);
    desk.refuse(&["plan", "recipe.toml"], &["data.captions", "keep_tags only has a meaning"]);
}

/// The page of the checks, beside what is printed.
#[test]
fn clips_are_looked_at_before_a_night_is_spent() {
    let desk = Desk::new();
    std::fs::copy(desk.path("clips/a.gif"), desk.path("clips/c.gif")).unwrap();
    desk.write("clips/c.txt", "the first cloud again");
    let told = desk.succeed(&["cache", "recipe.toml", "--report", "clips.html"]).stdout;
    assert!(told.contains("c.gif: nearly the same as a.gif"), "{told}");
    let page = std::fs::read_to_string(desk.path("clips.html")).unwrap();
    assert!(
        page.contains("nearly the same as a.gif") && page.matches("data:image/png").count() == 12,
        "{told}"
    );
    assert!(!page.contains("http") && !page.contains("{{"), "the page asks others for something");
    assert!(!desk.path("cache").join("entries").exists(), "it encodes nothing");
}
