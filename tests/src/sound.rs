//! Synthetic sounds, and the track of an MP4.

use std::path::Path;

/// `count` samples of a tone of `hertz` at `rate` samples a second, as loud as `peak`.
pub fn tone(hertz: f64, rate: u32, count: usize, peak: f32) -> Vec<f32> {
    let at = |n: usize| (2.0 * std::f64::consts::PI * hertz * n as f64 / f64::from(rate)).sin() as f32 * peak;
    (0..count).map(at).collect()
}

fn boxed(name: &[u8; 4], parts: &[&[u8]]) -> Vec<u8> {
    let contents = parts.concat();
    [&(contents.len() as u32 + 8).to_be_bytes(), &name[..], &contents].concat()
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_be_bytes()).collect()
}

/// Gives the MP4 at `path`, whose index is in front, a track of `samples` at `rate`, of which an edit cuts off the first `cut`. The
/// index is moved to the end, so that the picture stays where it is.
pub fn add_track(path: &Path, samples: &[f32], rate: u32, cut: u32) {
    let mut file = std::fs::read(path).unwrap();
    let at = file.windows(4).position(|name| name == b"moov").unwrap();
    let size = u32::from_be_bytes(file[at - 4..at].try_into().unwrap()) as usize;
    let old = file[at + 4..at - 4 + size].to_vec();
    file[at..at + 4].copy_from_slice(b"free");
    let (sound, count) = (data::pcm(&[samples]), samples.len() as u32);
    let place = file.len() as u32 + 8;
    file.extend(boxed(b"mdat", &[&sound]));
    let seconds = f64::from(count) / f64::from(rate);
    let length = (seconds * 1000.0).round() as u32;
    let mut header = words(&[0, 0, 2, 0, length, 0, 0, 0, 0x100_0000, 0x1_0000, 0, 0, 0, 0x1_0000, 0, 0, 0]);
    header.extend(words(&[0x4000_0000, 0, 0]));
    let edit = boxed(b"edts", &[&boxed(b"elst", &[&words(&[0, 1, length, cut, 0x1_0000])])]);
    let media = boxed(b"mdhd", &[&words(&[0, 0, 0, rate, count, 0x55c4_0000])]);
    let handler = boxed(b"hdlr", &[&words(&[0, 0]), b"soun", &[0; 12], b"sound\0"]);
    let entry = [&[0, 0, 0, 0, 0, 0, 0, 1][..], &[0; 8], &[0, 1, 0, 16, 0, 0, 0, 0], &words(&[rate << 16])];
    let kinds = boxed(b"stsd", &[&words(&[0, 1]), &boxed(b"sowt", &entry)]);
    let tables = boxed(
        b"stbl",
        &[
            &kinds,
            &boxed(b"stts", &[&words(&[0, 1, count, 1])]),
            &boxed(b"stsc", &[&words(&[0, 1, 1, count, 1])]),
            &boxed(b"stsz", &[&words(&[0, 2, count])]),
            &boxed(b"stco", &[&words(&[0, 1, place])]),
        ],
    );
    let data = boxed(b"dinf", &[&boxed(b"dref", &[&words(&[0, 1]), &boxed(b"url ", &[&words(&[1])])])]);
    let info = boxed(b"minf", &[&boxed(b"smhd", &[&words(&[0, 0])]), &data, &tables]);
    let track = boxed(
        b"trak",
        &[&boxed(b"tkhd", &[&words(&[3]), &header]), &edit, &boxed(b"mdia", &[&media, &handler, &info])],
    );
    file.extend(boxed(b"moov", &[&old, &track]));
    std::fs::write(path, file).unwrap();
}
