//! From a folder to training items: captions, buckets, windows, exact pixels, order.

use std::collections::BTreeMap;
use std::path::Path;

use data::bucket::Buckets;
use data::{
    Bucket, Cursor, DataConfig, DataError, Dataset, Extract, Film, Media, Order, OrderItem, SheetRow,
    SheetStyle, SizeMultiple, contact_sheet, scan, titled_sheet, write_gif, write_mp4, write_preview,
};
use proofs::film::{brightness, drifting, flat};
use proptest::prelude::*;

const MULTIPLE: SizeMultiple = SizeMultiple::new(16);
const RATE: f64 = 16.0;

fn config(folder: &Path, more: &str) -> DataConfig {
    let text =
        format!("{{\"folder\": {:?}, \"sizes\": [[48, 32], [32, 48]], \"frames\": [5, 9] {more}}}", folder);
    serde_json::from_str(&text).unwrap()
}

fn build(config: &DataConfig) -> data::Result<Dataset> {
    Dataset::build(config, MULTIPLE, RATE, &mut |_, _| {})
}

fn caption(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

fn still(path: &Path, value: u8) {
    let whole = SheetStyle { columns: 1, cell_width: 60, gap: 0 };
    contact_sheet(path, &[flat(60, 40, &[value])], whole).unwrap();
}

#[test]
fn every_kind_of_clip_is_found_in_a_fixed_order() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for below in ["b", ".hidden", "walk"] {
        std::fs::create_dir(root.join(below)).unwrap();
    }
    write_mp4(&root.join("b/film.mp4"), &drifting(48, 32, 9), RATE).unwrap();
    write_mp4(&root.join(".hidden/no.mp4"), &drifting(48, 32, 9), RATE).unwrap();
    write_gif(&root.join("a.gif"), &drifting(48, 32, 5), RATE).unwrap();
    still(&root.join("photo.png"), 7);
    for number in [10, 9, 11, 8, 12] {
        still(&root.join(format!("walk/f{number}.png")), number);
    }
    caption(root, "b/metadata.jsonl", "{\"file_name\": \"film.mp4\", \"text\": \"a film\"}\n");
    caption(root, "a.txt", "a moving picture\n");
    caption(root, "photo.txt", "myword on a beach");
    caption(root, "walk.txt", "a walk");
    let config =
        config(root, ", \"trigger\": \"myword\", \"held_out\": [\"photo*\"], \"repeats\": {\"b/*\": 3}");
    let items = scan(&config).unwrap();
    let ids: Vec<&str> = items.iter().map(|item| item.id.as_str()).collect();
    assert_eq!(ids, ["a.gif", "b/film.mp4", "photo.png", "walk"]);
    assert_eq!(items[0].caption, "myword, a moving picture");
    assert_eq!((items[1].caption.as_str(), items[1].repeats), ("myword, a film", 3));
    assert_eq!((items[2].caption.as_str(), items[2].held_out), ("myword on a beach", true));
    let Media::Pictures { files, .. } = &items[3].media else { panic!("{:?}", items[3].media) };
    assert!(files[0].ends_with("f8.png") && files[4].ends_with("f12.png"), "{files:?}");

    let data = build(&config).unwrap();
    let walk: Vec<_> = data.clips(3, &data.windows).unwrap().collect::<data::Result<_>>().unwrap();
    let values: Vec<u8> = walk[0].frames().map(brightness).collect();
    assert_eq!(values, [8, 9, 10, 11, 12]);
    let (trained, held_out) = data.split();
    assert_eq!((trained.as_slice(), held_out.as_slice()), ([0, 1, 3].as_slice(), [2].as_slice()));
    let order = Order::new(data.order_items(&trained), 1, 2);
    assert_eq!(order.batches(0)[0].items, [1, 1], "the film has the largest bucket and three repeats");
    let table = data.table().to_string();
    assert!(table.contains("48x32") && table.lines().count() == 4, "{table}");
}

#[test]
fn what_is_wrong_with_a_folder_is_said_in_full() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let message = |more: &str| build(&config(root, more)).unwrap_err().to_string();
    assert!(message("").contains("no clips in"), "{}", message(""));
    write_gif(&root.join("one.gif"), &drifting(48, 32, 3), RATE).unwrap();
    write_gif(&root.join("two.gif"), &drifting(48, 32, 4), RATE).unwrap();
    let text = message("");
    assert!(
        text.contains("2 clips without a caption") && text.contains("one.gif") && text.contains("two.gif"),
        "{text}"
    );
    caption(root, "one.txt", "  \n");
    caption(root, "two.txt", "x");
    let text = message("");
    assert!(
        text.contains("one.gif: its caption is empty") && text.contains("two.gif: it has 4 frames"),
        "{text}"
    );
    let text = message(", \"empty_captions\": \"allow\"");
    assert!(text.contains("one.gif (3 frames)") && text.contains("two.gif (4 frames)"), "{text}");
    assert!(text.contains("shortest bucket of 5 frames"), "{text}");
    caption(root, "one.txt", "y");
    assert!(message(", \"held_out\": [\"three*\"]").contains("matches no clip"));
    assert!(message(", \"held_out\": [\"*\"]").contains("nothing is left"));
    caption(root, "metadata.csv", "video,prompt\none.gif,a\nnone.gif,b\n");
    let text = message("");
    assert!(text.contains("metadata.csv, line 3") && text.contains("none.gif"), "{text}");
}

#[test]
fn what_is_wrong_with_a_recipe_is_said_with_the_way_out() {
    let refuse = |text: &str, multiple| {
        let config: DataConfig = serde_json::from_str(text).unwrap();
        config.check(SizeMultiple::new(multiple)).unwrap_err().to_string()
    };
    let text = refuse(r#"{"folder": "x", "sizes": [[832, 470]]}"#, 16);
    assert!(text.contains("832x470") && text.contains("832x464, 832x480"), "{text}");
    assert!(refuse(r#"{"folder": "x", "sizes": [[48, 32]]}"#, 32).contains("32x32, 64x32"));
    assert!(refuse(r#"{"folder": "x", "frames": [16]}"#, 16).contains("nearest: 13, 17"));
    assert!(refuse(r#"{"folder": "x", "stride": 4}"#, 16).contains("sliding"));
    assert!(refuse(r#"{"folder": []}"#, 16).contains("no folder"));
    let unknown =
        serde_json::from_str::<DataConfig>(r#"{"folder": "x", "framse": [17]}"#).unwrap_err().to_string();
    assert!(unknown.contains("framse") && unknown.contains("frames"), "{unknown}");
    let many: DataConfig = serde_json::from_str(r#"{"folder": ["x", "y"]}"#).unwrap();
    assert_eq!(many.folder.len(), 2);
    many.check(MULTIPLE).unwrap();
    many.check(SizeMultiple::new(32)).unwrap();
}

/// Frames of uneven length: 40, 300, 40, 300 ms. At 10 a second, the frame on screen at each tenth must be the nearest one.
#[test]
fn variable_frame_rate_is_resampled_by_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("uneven.gif");
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
    for (value, milliseconds) in [(10, 40), (80, 300), (150, 40), (220, 320)] {
        let pixels = image::RgbaImage::from_pixel(48, 32, image::Rgba([value, value, value, 255]));
        let delay = image::Delay::from_numer_denom_ms(milliseconds, 1);
        encoder.encode_frame(image::Frame::from_parts(pixels, 0, 0, delay)).unwrap();
    }
    drop(encoder);
    std::fs::write(path, bytes).unwrap();
    caption(folder.path(), "uneven.txt", "x");
    let mut config = config(folder.path(), ", \"fps\": 10");
    let data = build(&config).unwrap();
    // Frames begin at 0, 40, 340 and 380 ms and end at 700: seven tenths, of which the bucket takes five.
    assert_eq!(data.sources[0].frames, 7);
    let clip = data.clips(0, &data.windows).unwrap().next().unwrap().unwrap();
    let values: Vec<u8> = clip.frames().map(brightness).collect();
    assert_eq!(values, [10, 80, 80, 150, 220]);

    config.source_fps = Some(10.0);
    config.frames = vec![1];
    assert_eq!(build(&config).unwrap().sources[0].frames, 4);
}

#[test]
fn each_extraction_cuts_the_right_frames() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<u8> = (0..23).map(|frame| 20 + frame * 10).collect();
    write_mp4(&folder.path().join("ramp.mp4"), &flat(48, 32, &values), RATE).unwrap();
    caption(folder.path(), "ramp.txt", "x");
    let starts_of = |more: &str| -> Vec<usize> {
        let data = build(&config(folder.path(), more)).unwrap();
        let clips: Vec<_> = data.clips(0, &data.windows).unwrap().collect::<data::Result<_>>().unwrap();
        assert_eq!(clips.len(), data.windows.len());
        for clip in &clips {
            assert_eq!(clip.bucket, Bucket { width: 48, height: 32, frames: 9 });
            for (offset, frame) in clip.frames().enumerate() {
                // Flat frames survive H.264 almost exactly; neighbours are 10 apart.
                assert!(brightness(frame).abs_diff(values[clip.start + offset]) <= 3);
            }
        }
        clips.iter().map(|clip| clip.start).collect()
    };
    assert_eq!(starts_of(""), [0]);
    assert_eq!(starts_of(", \"extract\": \"middle\""), [7]);
    assert_eq!(starts_of(", \"extract\": \"uniform\", \"windows\": 3"), [0, 7, 14]);
    assert_eq!(starts_of(", \"extract\": \"sliding\""), [0, 9]);
    assert_eq!(starts_of(", \"extract\": \"sliding\", \"stride\": 4"), [0, 4, 8, 12]);
}

#[test]
fn preview_writes_the_trained_clips_with_their_captions() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("in")).unwrap();
    let root = folder.path().join("in");
    write_mp4(&root.join("film.mp4"), &drifting(96, 64, 12), RATE).unwrap();
    still(&root.join("photo.png"), 99);
    caption(&root, "film.txt", "a film");
    caption(&root, "photo.txt", "a photo");
    let data = build(&config(&root, ", \"caption_prefix\": \"old: \"")).unwrap();
    let out = folder.path().join("out");
    let files = write_preview(&out, &data, &mut |_, _| {}).unwrap();
    let names: Vec<String> =
        files.iter().map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(names, ["film.mp4_00000_48x32x9.mp4", "photo.png_00000_48x32x1.png"]);
    assert_eq!(std::fs::read_to_string(files[0].with_extension("txt")).unwrap(), "old: a film");
    let probe = data::decode::probe(&Media::Video(files[0].clone()), RATE).unwrap();
    assert_eq!((probe.width, probe.height, probe.times.len()), (48, 32, 9));
}

#[test]
fn films_take_what_a_vae_gives() {
    let planes = [-1.0, 1.0, 0.0, 2.0, -3.0, f32::NAN];
    let film = Film::from_planes(1, 2, &planes).unwrap();
    assert_eq!(film.frames().next().unwrap(), [0, 128, 0, 255, 255, 0]);
    assert!(Film::from_planes(2, 2, &planes).is_none());
}

fn extraction() -> impl Strategy<Value = (Extract, Option<u32>, Option<u32>)> {
    prop_oneof![
        Just((Extract::Head, None, None)),
        Just((Extract::Middle, None, None)),
        prop::option::of(1_u32..9).prop_map(|windows| (Extract::Uniform, windows, None)),
        prop::option::of(1_u32..40).prop_map(|stride| (Extract::Sliding, None, stride)),
    ]
}

proptest! {
    #[test]
    fn buckets_are_nearest_in_aspect_and_longest_that_fit(
        width in 16_u32..4000, height in 16_u32..4000, frames in 1_usize..400,
        sizes in prop::collection::vec((1_u32..80, 1_u32..80), 1..6), lengths in prop::collection::vec(0_u32..40, 1..5),
        (extract, windows, stride) in extraction(),
    ) {
        let mut config: DataConfig = serde_json::from_str(r#"{"folder": "x"}"#).unwrap();
        config.sizes = sizes.iter().map(|&(w, h)| [w * 16, h * 16]).collect();
        config.frames = lengths.iter().map(|n| 4 * n + 1).collect();
        (config.extract, config.windows, config.stride) = (extract, windows, stride);
        let buckets = Buckets::new(&config, MULTIPLE).unwrap();
        let Some(bucket) = buckets.of_clip(width, height, frames) else {
            prop_assert!(config.frames.iter().all(|&length| length as usize > frames));
            return Ok(());
        };
        prop_assert!(config.sizes.contains(&[bucket.width, bucket.height]));
        let longest = config.frames.iter().filter(|&&length| length as usize <= frames).max();
        prop_assert_eq!(longest, Some(&bucket.frames));
        let aspect = |w: u32, h: u32| (f64::from(w) / f64::from(h)).ln();
        let distance = |w, h| (aspect(w, h) - aspect(width, height)).abs();
        let best = config.sizes.iter().map(|&[w, h]| distance(w, h)).fold(f64::INFINITY, f64::min);
        prop_assert!(distance(bucket.width, bucket.height) <= best + 0.03 + 1e-12);
        let starts = buckets.starts(frames, bucket.frames as usize);
        prop_assert!(!starts.is_empty() && starts.windows(2).all(|pair| pair[0] < pair[1]));
        prop_assert!(starts.iter().all(|start| start + bucket.frames as usize <= frames));
    }

    #[test]
    fn an_epoch_holds_every_item_as_often_as_it_repeats(
        items in prop::collection::vec((0_u32..4, 1_u32..4), 1..40), seed: u64, epoch in 0_u64..5, size in 1_usize..7,
    ) {
        let items: Vec<OrderItem> = items.into_iter().map(|(kind, repeats)| OrderItem {
            bucket: Bucket { width: 32, height: 32, frames: 4 * kind + 1 }, repeats, pool: 0, share: None }).collect();
        let order = Order::new(items.clone(), seed, size);
        let batches = order.batches(epoch);
        prop_assert_eq!(&batches, &Order::new(items.clone(), seed, size).batches(epoch));
        prop_assert_eq!(batches.len() as u64, order.batches_of(1).unwrap());
        let mut seen: BTreeMap<usize, u32> = BTreeMap::new();
        for batch in &batches {
            prop_assert!(!batch.items.is_empty() && batch.items.len() <= size);
            for &item in &batch.items {
                prop_assert_eq!(items[item].bucket, batch.bucket);
                *seen.entry(item).or_default() += 1;
            }
        }
        prop_assert!(items.iter().enumerate().all(|(index, item)| seen.get(&index) == Some(&item.repeats)));
        if epoch == 0 {
            let pixels = |batch: &data::Batch| batch.bucket.volume() * batch.items.len() as u64;
            prop_assert_eq!(pixels(&batches[0]), batches.iter().map(pixels).max().unwrap());
        }
    }

    #[test]
    fn a_cursor_continues_the_same_order(seed: u64, stop in 0_usize..30) {
        let items = (0..7).map(|index| OrderItem { bucket: Bucket { width: 16, height: 16, frames: 1 + 4 * (index % 2) }, repeats: 1, pool: 0, share: None });
        let order = Order::new(items.collect(), seed, 2);
        let straight: Vec<_> = order.from(Cursor::default()).take(stop + 12).collect();
        let cursor = if stop == 0 { Cursor::default() } else { straight[stop - 1].1 };
        let resumed: Vec<_> = order.from(cursor).take(12).collect();
        prop_assert_eq!(&straight[stop..], &resumed[..]);
    }

    #[test]
    fn metadata_readers_never_panic(text in "(?s)[\\PC\\n\\r\",{}:]{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let keys = &data::COMPANION_KEYS;
        let _ = data::metadata::parse_csv(&text, keys);
        let _ = data::metadata::parse_csv(&format!("video,prompt,control\n{text}"), keys);
        let _ = data::metadata::parse_jsonl(&text, keys);
        let _ = data::metadata::parse_jsonl(&String::from_utf8_lossy(&bytes), keys);
    }

    /// Whatever a caption holds, a CSV that quotes it gives it back.
    #[test]
    fn csv_gives_back_any_quoted_caption(caption in "[a-z\",\\n;é]{1,40}") {
        let text = format!("file_name,caption\na.mp4,\"{}\"\n", caption.replace('"', "\"\""));
        let rows = data::metadata::parse_csv(&text, &[]).unwrap();
        prop_assert_eq!(&rows[0].captions, &[caption.trim()]);
    }
}

#[test]
fn too_short_is_its_own_error() {
    let folder = tempfile::tempdir().unwrap();
    write_gif(&folder.path().join("a.gif"), &drifting(48, 32, 2), RATE).unwrap();
    caption(folder.path(), "a.txt", "x");
    assert!(matches!(build(&config(folder.path(), "")), Err(DataError::TooShort { .. })));
}

/// Titles are written in letters of two colours above their rows, cut where they do not fit; the films below stay as they are.
#[test]
fn a_contact_sheet_has_the_title_of_each_row() {
    let folder = tempfile::tempdir().unwrap();
    let film = flat(64, 40, &[90, 120]);
    let style = SheetStyle { columns: 2, cell_width: 64, gap: 2 };
    let draw = |name: &str, titles: [&str; 2]| {
        let path = folder.path().join(name);
        let rows = titles.map(|title| SheetRow { title, film: &film });
        titled_sheet(&path, &rows, style).unwrap();
        image::open(&path).unwrap().to_rgb8()
    };
    let (plain, titled) =
        (draw("plain.png", ["", ""]), draw("titled.png", ["step 1 a fox", "step 1 a fox \u{6f22}"]));
    assert_eq!((plain.width(), titled.width(), titled.height() - plain.height()), (134, 134, 20));
    let row = |sheet: &image::RgbImage, top: u32| {
        image::imageops::crop_imm(sheet, 0, top, sheet.width(), 40).to_image()
    };
    assert!(row(&plain, 2) == row(&titled, 12) && row(&plain, 44) == row(&titled, 64), "the films differ");
    let inked = |top: u32| {
        let strip = image::imageops::crop_imm(&titled, 0, top, 134, 10).to_image();
        strip.pixels().filter(|pixel| pixel.0[0] > 200).count()
    };
    assert!(inked(2) > 50 && inked(54) > inked(2), "{} and {} pixels of ink", inked(2), inked(54));
    let long = "a title that is far too long for the sheet";
    assert_eq!(draw("long.png", [long, long]).dimensions(), titled.dimensions());
}
