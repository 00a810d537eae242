//! Tar files of clips: unpacked once, read as folders are, and never outside of their own folder.

use std::fs;
use std::path::{Path, PathBuf};

use data::{DataConfig, Dataset, SizeMultiple, Takes, Watch, write_webp};
use proofs::film::drifting;
use serde_json::{Value, json};

fn build(config: &Value, cache: Option<&Path>) -> data::Result<Dataset> {
    let config: DataConfig = serde_json::from_value(config.clone()).unwrap();
    let model = Takes { multiple: SizeMultiple::new(16), fps: 16.0, companions: &[] };
    let mut watch = Watch { progress: &mut |_, _| {}, is_stopped: &|| false, cache };
    Dataset::build_watched(&config, &model, &mut watch)
}

/// A folder with room for shards, and the bytes of a clip.
struct Desk {
    root: tempfile::TempDir,
    clip: Vec<u8>,
}

impl Desk {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("clip.webp");
        write_webp(&path, &drifting(64, 32, 9), 16.0).unwrap();
        Self { clip: fs::read(&path).unwrap(), root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn cache(&self) -> PathBuf {
        self.path("cache")
    }

    /// Writes a tar file with these files, of which `None` is the clip.
    fn shard(&self, name: &str, files: &[(&str, Option<&str>)]) {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, text) in files {
            let bytes = text.map_or(self.clip.as_slice(), str::as_bytes);
            archive.append(&header(name, bytes.len()), bytes).unwrap();
        }
        fs::write(self.path(name), archive.into_inner().unwrap()).unwrap();
    }

    fn config(&self, folder: &str) -> Value {
        json!({ "folder": self.path(folder), "sizes": [[32, 32]], "frames": [5] })
    }

    fn refused(&self, folder: &str) -> String {
        let error = build(&self.config(folder), Some(&self.cache())).unwrap_err().to_string();
        let unpacked = fs::read_dir(self.cache().join("shards"));
        assert_eq!(unpacked.map_or(0, Iterator::count), 0, "something was left of a shard: {error}");
        error
    }
}

/// The header of a file whose name is written as it is, which the crate's own functions would not do for every name.
fn header(name: &str, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(size as u64);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    header
}

fn ids(dataset: &Dataset) -> Vec<(&str, &str)> {
    dataset.sources.iter().map(|source| (source.item.id.as_str(), source.item.caption.as_str())).collect()
}

#[test]
fn shards_are_read_as_folders_of_their_names() {
    let desk = Desk::new();
    desk.shard(
        "s-0.tar",
        &[("0001.webp", None), ("0001.txt", Some("one")), ("0001.json", Some("{\"url\": 3}"))],
    );
    desk.shard(
        "s-1.tar",
        &[
            ("./0001.webp", None),
            ("./0001.json", Some("{\"caption\": \"two\", \"width\": 64}")),
            ("more/0002.webp", None),
            ("more/0002.json", Some("[\"three\"]")),
        ],
    );
    desk.shard("other.tar", &[("x.webp", None)]);
    let both = build(&desk.config("s-*.tar"), Some(&desk.cache())).unwrap();
    assert_eq!(
        ids(&both),
        [("s-0/0001.webp", "one"), ("s-1/0001.webp", "two"), ("s-1/more/0002.webp", "three")]
    );
    let one = build(&desk.config("s-0.tar"), Some(&desk.cache())).unwrap();
    assert_eq!(ids(&one), [("0001.webp", "one")]);

    // The same clips in a folder have the same entries.
    fs::create_dir(desk.path("clips")).unwrap();
    fs::write(desk.path("clips/0001.webp"), &desk.clip).unwrap();
    fs::write(desk.path("clips/0001.txt"), "one").unwrap();
    let plain = build(&desk.config("clips"), None).unwrap();
    assert_eq!(one.key(&one.windows[0], "content", "vae"), plain.key(&plain.windows[0], "content", "vae"));
    assert_eq!(one.windows, plain.windows);
}

#[test]
fn a_shard_is_unpacked_once_for_its_contents() {
    let desk = Desk::new();
    desk.shard("s.tar", &[("a.webp", None), ("a.txt", Some("one"))]);
    let captions = || {
        let built = build(&desk.config("s.tar"), Some(&desk.cache())).unwrap();
        built.sources[0].item.caption.clone()
    };
    assert_eq!(captions(), "one");
    let unpacked = fs::read_dir(desk.cache().join("shards")).unwrap().next().unwrap().unwrap().path();
    fs::write(unpacked.join("a.txt"), "touched").unwrap();
    assert_eq!(captions(), "touched", "it was unpacked again");
    desk.shard("s.tar", &[("a.webp", None), ("a.txt", Some("another"))]);
    assert_eq!(captions(), "another");
    let text = build(&desk.config("s.tar"), None).unwrap_err().to_string();
    assert!(text.contains("data.folder") && text.contains("unpacked into the cache"), "{text}");
}

/// An archive from the network must not write where it likes, and half an archive must not be trained as a whole one.
#[test]
fn shards_that_lead_out_or_break_off_are_refused() {
    let desk = Desk::new();
    for name in ["../evil.txt", "/evil.txt", "a/../../evil.txt"] {
        desk.shard("s.tar", &[("a.webp", None), (name, Some("evil"))]);
        let text = desk.refused("s.tar");
        assert!(text.contains("s.tar") && text.contains("lies outside"), "{name}: {text}");
        assert!(!desk.path("evil.txt").exists() && !desk.path("cache/evil.txt").exists());
    }
    let mut archive = tar::Builder::new(Vec::new());
    let mut link = header("a.webp", 0);
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_link_name(desk.path("clip.webp")).unwrap();
    link.set_cksum();
    archive.append(&link, &[][..]).unwrap();
    fs::write(desk.path("s.tar"), archive.into_inner().unwrap()).unwrap();
    assert!(desk.refused("s.tar").contains("is a link"));
    desk.shard("s.tar", &[("a.txt", Some("one")), ("a.txt", Some("two"))]);
    assert!(desk.refused("s.tar").contains("a.txt twice"));
    desk.shard("s.tar", &[("a.txt", Some("one")), ("a.webp", None)]);
    let whole = fs::read(desk.path("s.tar")).unwrap();
    fs::write(desk.path("s.tar"), &whole[..1024 + 512 + desk.clip.len() / 2]).unwrap();
    let text = desk.refused("s.tar");
    assert!(text.contains("it ends within a.webp") || text.contains("no whole tar file"), "{text}");
    fs::write(desk.path("s.tar"), "no tar file at all".repeat(99)).unwrap();
    assert!(desk.refused("s.tar").contains("no whole tar file"));
    fs::write(desk.path("s.tar"), "").unwrap();
    assert!(desk.refused("s.tar").contains("it holds no file"));
    assert!(desk.refused("none-*.tar").contains("there is no tar file"));
}
