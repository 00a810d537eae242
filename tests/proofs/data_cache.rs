//! The cache returns what was stored, and never anything else.

use std::collections::BTreeMap;

use data::cache::{decode_entry, encode_entry};
use data::{Cache, ContentHashes, DataError, HostTensor, Key, Lookup, Media, MissReason, Storage};
use proptest::prelude::*;

fn tensor(shape: &[usize]) -> HostTensor {
    let count = shape.iter().product();
    HostTensor::new(
        shape.to_vec(),
        (0..count).map(|index: usize| (index as f32 * 0.37).sin() * 3.0).collect(),
    )
    .unwrap()
}

fn meta() -> BTreeMap<String, String> {
    BTreeMap::from([("source".to_string(), "a/b.mp4".to_string())])
}

#[test]
fn entries_come_back_exactly_and_survive_being_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path().join("cache")).unwrap();
    cache.check_writable().unwrap();
    let (key, latents, text) = (Key::of(&["one"]), tensor(&[16, 3, 4, 5]), tensor(&[7, 24]));
    assert_eq!(cache.get(&key).unwrap(), Lookup::Miss { reason: MissReason::Absent });
    let tensors = [("latents", &latents, Storage::F32), ("text", &text, Storage::Bf16)];
    for _ in 0..2 {
        cache.put(&key, &tensors, &meta()).unwrap();
        let Lookup::Hit(entry) = cache.get(&key).unwrap() else { panic!("a fresh entry is a hit") };
        assert_eq!((&entry.tensors["latents"], &entry.meta), (&latents, &meta()));
        let rounded = entry.tensors["text"].data();
        // bfloat16 keeps 8 bits, so rounding moves a value by at most 2^-8 of itself.
        assert!(text.data().iter().zip(rounded).all(|(a, b)| (a - b).abs() <= a.abs() / 256.0));
    }
    let folder = cache.folder().join(&key.to_string()[..2]);
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn a_foreign_or_half_written_file_is_a_miss() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path()).unwrap();
    let (one, two) = (Key::of(&["one"]), Key::of(&["two"]));
    cache.put(&one, &[("x", &tensor(&[4]), Storage::F32)], &meta()).unwrap();
    let path = |key: &Key| folder.path().join(&key.to_string()[..2]).join(format!("{key}.safetensors"));
    std::fs::create_dir_all(path(&two).parent().unwrap()).unwrap();
    std::fs::copy(path(&one), path(&two)).unwrap();
    let reason = |key| match cache.get(key).unwrap() {
        Lookup::Miss { reason } => reason.to_string(),
        Lookup::Hit(_) => panic!("must not be believed"),
    };
    assert!(reason(&two).contains("another entry"));
    let bytes = std::fs::read(path(&one)).unwrap();
    std::fs::write(path(&one), &bytes[..bytes.len() - 3]).unwrap();
    assert!(reason(&one).contains("damaged"));
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(path(&one), flipped).unwrap();
    assert!(reason(&one).contains("checksum"));
    // A header that claims 2^63 bytes.
    let mut lying = bytes;
    lying[..8].copy_from_slice(&(1_u64 << 63).to_le_bytes());
    std::fs::write(path(&one), lying).unwrap();
    assert!(reason(&one).contains("header"));
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("occupied");
    std::fs::write(&file, "not a folder").unwrap();
    let error = Cache::open(file.join("cache")).unwrap_err();
    assert!(
        matches!(error, DataError::CacheReadOnly { .. }) && error.to_string().contains("occupied"),
        "{error}"
    );

    use std::os::unix::fs::PermissionsExt;
    let locked = folder.path().join("locked");
    std::fs::create_dir(&locked).unwrap();
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o555)).unwrap();
    let cache = Cache::open(&locked).unwrap();
    // Root may write anywhere, so there the system never refuses and there is nothing to see.
    if std::fs::write(locked.join("probe"), "").is_err() {
        let refusals = [cache.check_writable(), cache.put(&Key::of(&["k"]), &[], &meta())];
        assert!(refusals.iter().all(|refusal| matches!(refusal, Err(DataError::CacheReadOnly { .. }))));
    }
}

#[test]
fn content_hashes_follow_the_content() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path().join("cache")).unwrap();
    let path = folder.path().join("clip.mp4");
    let media = Media::Video(path.clone());
    std::fs::write(&path, "one").unwrap();
    let mut hashes = ContentHashes::open(&cache);
    let one = hashes.of(&media).unwrap();
    hashes.save().unwrap();
    assert_eq!(ContentHashes::open(&cache).of(&media).unwrap(), one);
    std::fs::write(&path, "three").unwrap();
    assert_ne!(ContentHashes::open(&cache).of(&media).unwrap(), one);
    std::fs::write(cache.folder().join("content-hashes.json"), "{broken").unwrap();
    std::fs::write(&path, "one").unwrap();
    assert_eq!(ContentHashes::open(&cache).of(&media).unwrap(), one);
    // A damaged index is rewritten even if nothing is looked up.
    ContentHashes::open(&cache).save().unwrap();
    let index = std::fs::read(cache.folder().join("content-hashes.json")).unwrap();
    assert!(serde_json::from_slice::<serde_json::Value>(&index).is_ok());
}

proptest! {
    /// Every byte of an entry is covered: for any change, truncation or forgery the reader refuses or returns the original.
    #[test]
    fn a_corrupted_entry_is_never_believed(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4), cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (key, latents) = (Key::of(&["k"]), tensor(&[2, 3, 4]));
        let whole = encode_entry(&key, &[("latents", &latents, Storage::F32)], &BTreeMap::new()).unwrap();
        let mut bytes = whole.clone();
        for (place, change) in flips {
            let at = place.index(bytes.len());
            bytes[at] ^= change;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(entry) = decode_entry(&bytes, &key) {
            prop_assert_eq!(&entry.tensors["latents"], &latents);
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_entry(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decode_entry(&bytes, &Key::of(&["k"])).is_err());
    }
}

/// The checksum is compared when an entry is first read, by a clone too; a cache that is opened anew compares it again. Heads
/// and lengths are looked at without reading the rest.
#[test]
fn a_checksum_is_verified_once_and_a_length_always() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path()).unwrap();
    let key = Key::of(&["one"]);
    assert_eq!(cache.peek(&key).unwrap(), Some(MissReason::Absent));
    cache.put(&key, &[("x", &tensor(&[4]), Storage::F32)], &meta()).unwrap();
    assert_eq!(cache.peek(&key).unwrap(), None);
    let path = folder.path().join(&key.to_string()[..2]).join(format!("{key}.safetensors"));
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;

    std::fs::write(&path, &flipped).unwrap();
    assert!(matches!(cache.get(&key).unwrap(), Lookup::Miss { reason: MissReason::Damaged(_) }));
    std::fs::write(&path, &whole).unwrap();
    assert!(matches!(cache.get(&key).unwrap(), Lookup::Hit(_)));
    std::fs::write(&path, &flipped).unwrap();
    assert!(matches!(cache.clone().get(&key).unwrap(), Lookup::Hit(_)), "it is hashed again");
    let anew = Cache::open(folder.path()).unwrap();
    assert!(matches!(anew.get(&key).unwrap(), Lookup::Miss { reason: MissReason::Damaged(_) }));

    for cut in [whole.len() - 1, 100, 9, 5, 0] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert!(matches!(cache.peek(&key).unwrap(), Some(MissReason::Damaged(_))), "cut to {cut}");
        assert!(matches!(cache.get(&key).unwrap(), Lookup::Miss { .. }), "cut to {cut}");
    }
    cache.remove(&key).unwrap();
    assert_eq!(cache.peek(&key).unwrap(), Some(MissReason::Absent));
}
