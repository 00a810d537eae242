//! Speech of clips: files and tracks of any rate as 16 kHz mono, where the picture begins; what cannot be heard is named.

use std::path::Path;

use data::{
    DataConfig, Dataset, SPEECH_RATE, SizeMultiple, read_speech, speech_seconds, write_gif, write_mp4,
    write_wav,
};
use proofs::film::drifting;
use proofs::sound::{add_track, tone};

const RATE: f64 = 16.0;

/// The largest distance of `heard` from a tone of `hertz` as loud as `peak`, away from the ends, where a filter rings.
fn off(heard: &[f32], hertz: f64, peak: f32) -> f32 {
    let expected = tone(hertz, SPEECH_RATE, heard.len(), peak);
    let pairs = heard.iter().zip(&expected).skip(400).take(heard.len() - 800);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A tone on one of two channels, at rates above and below: as long, in time, and half as loud. One above what 16 kHz can carry is gone.
#[test]
fn files_are_heard_as_mono_at_the_rate_of_speech() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tone.wav");
    for rate in [8000, 16_000, 22_050, 44_100, 48_000] {
        let count = rate as usize * 3 / 2 + 1;
        let (left, right) = (tone(440.0, rate, count, 0.5), vec![0.0; count]);
        write_wav(&path, &[&left, &right], rate).unwrap();
        let heard = read_speech(&path).unwrap();
        let expected = (count as f64 * f64::from(SPEECH_RATE) / f64::from(rate)).ceil() as usize;
        assert!(heard.len().abs_diff(expected) <= 1, "{rate}: {} for {expected}", heard.len());
        assert!(off(&heard, 440.0, 0.25) < 2e-3, "{rate}: {}", off(&heard, 440.0, 0.25));
        assert!((speech_seconds(&path).unwrap() - count as f64 / f64::from(rate)).abs() < 1e-6);
    }
    write_wav(&path, &[&tone(12_000.0, 48_000, 48_000, 0.5)], 48_000).unwrap();
    let heard = read_speech(&path).unwrap();
    let loudest = heard[400..heard.len() - 400].iter().fold(0f32, |most, x| most.max(x.abs()));
    assert!(loudest < 1e-3, "12 kHz sounds as something else: {loudest}");
}

/// What an edit list cuts off is not heard: encoders put such samples before the first frame of the picture.
#[test]
fn a_track_begins_with_the_picture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("film.mp4");
    let samples: Vec<f32> = vec![0.75; 1000].into_iter().chain(tone(300.0, 16_000, 16_000, 0.5)).collect();
    write_mp4(&path, &drifting(48, 32, 16), RATE).unwrap();
    let silent = read_speech(&path).unwrap_err().to_string();
    assert!(silent.contains("film.mp4") && silent.contains("no audio track"), "{silent}");
    add_track(&path, &samples, 16_000, 1000);
    let heard = read_speech(&path).unwrap();
    assert_eq!(heard.len(), 16_000);
    assert!(heard.iter().zip(&samples[1000..]).all(|(a, b)| (a - b).abs() < 1e-4));
    assert!((speech_seconds(&path).unwrap() - 1.0).abs() < 1e-6);
}

fn built(root: &Path, audio: &str) -> data::Result<Dataset> {
    let text = format!(
        "{{\"folder\": {:?}, \"sizes\": [[48, 32]], \"frames\": [5, 9], \"stills\": \"skip\", \"audio\": {audio:?}}}",
        root.join("clips")
    );
    let config: DataConfig = serde_json::from_str(&text).unwrap();
    Dataset::build(&config, SizeMultiple::new(16), RATE, &mut |_, _| {})
}

/// A file beside the clip, the clip's own track, a file in a folder; as long as the clip, up to a frame.
#[test]
fn speech_is_found_and_must_be_as_long_as_its_clip() {
    let folder = tempfile::tempdir().unwrap();
    let (root, clips) = (folder.path(), folder.path().join("clips"));
    for name in [clips.clone(), root.join("audio")] {
        std::fs::create_dir(name).unwrap();
    }
    write_mp4(&clips.join("a.mp4"), &drifting(48, 32, 16), RATE).unwrap();
    std::fs::write(clips.join("a.txt"), "a clip").unwrap();
    let refused = |audio: &str| built(root, audio).unwrap_err().to_string();
    let seconds = |tenths: usize| tone(300.0, 16_000, 1600 * tenths, 0.5);
    let path_of = |audio: &str| {
        let mut data = built(root, audio).unwrap();
        data.sources.remove(0).companions.speech.unwrap().path
    };
    let text = refused("own");
    assert!(text.contains("a.mp4") && text.contains("no audio track"), "{text}");

    add_track(&clips.join("a.mp4"), &seconds(8), 16_000, 0);
    let text = refused("own");
    assert!(text.contains("0.80 seconds") && text.contains("1.00") && text.contains("a.mp4"), "{text}");
    write_wav(&clips.join("a.wav"), &[&seconds(10)], 16_000).unwrap();
    assert_eq!(path_of("own"), clips.join("a.wav"), "the file beside the clip comes first");
    // A track may end within the last frame.
    write_wav(&clips.join("a.wav"), &[&seconds(10)[..15_100]], 16_000).unwrap();
    assert_eq!(path_of("own"), clips.join("a.wav"));

    let audio = root.join("audio");
    let text = refused(audio.to_str().unwrap());
    assert!(text.contains("data.audio needs an audio file") && text.contains("audio/a"), "{text}");
    std::fs::write(audio.join("a.mp3"), "this is a text, and no sound at all").unwrap();
    let text = refused(audio.to_str().unwrap());
    assert!(text.contains("a.mp3") && text.contains("no audio can be read"), "{text}");
    std::fs::remove_file(audio.join("a.mp3")).unwrap();
    write_wav(&audio.join("a.flac"), &[&seconds(11)], 16_000).unwrap();
    assert_eq!(path_of(audio.to_str().unwrap()), audio.join("a.flac"), "by its contents, not its name");

    write_gif(&clips.join("b.gif"), &drifting(48, 32, 9), RATE).unwrap();
    std::fs::write(clips.join("b.txt"), "a clip without sound").unwrap();
    let text = refused("own");
    assert!(text.contains("b.gif") && text.contains("put an audio file of its name beside it"), "{text}");
}

/// Beside the clip, where its sound is silent and where it is loud; of a window that begins later, its own sound.
#[test]
fn a_preview_shows_the_waveform_of_speech() {
    let folder = tempfile::tempdir().unwrap();
    let (root, clips) = (folder.path(), folder.path().join("clips"));
    std::fs::create_dir(&clips).unwrap();
    write_mp4(&clips.join("a.mp4"), &drifting(48, 32, 18), RATE).unwrap();
    std::fs::write(clips.join("a.txt"), "a clip").unwrap();
    // Silent for the first half of the first nine frames, and for the second half of the next.
    let (quiet, loud) = (vec![0.0; 4500], tone(300.0, 16_000, 9000, 0.9));
    write_wav(&clips.join("a.wav"), &[&[quiet.clone(), loud, quiet].concat()], 16_000).unwrap();
    let text = format!(
        "{{\"folder\": {clips:?}, \"sizes\": [[48, 32]], \"frames\": [9], \"stills\": \"skip\", \"audio\": \"own\", \
         \"extract\": \"sliding\"}}"
    );
    let config: DataConfig = serde_json::from_str(&text).unwrap();
    let data = Dataset::build(&config, SizeMultiple::new(16), RATE, &mut |_, _| {}).unwrap();
    let written = data::write_preview(&root.join("look"), &data, &mut |_, _| {}).unwrap();
    assert_eq!(written.len(), 2);
    for (path, is_first_quiet) in written.iter().zip([true, false]) {
        let media = data::Media::Video(path.clone());
        let probe = data::decode::probe(&media, RATE).unwrap();
        assert_eq!((probe.width, probe.height, probe.times.len()), (96, 32, 9));
        let last = data::decode::frames(&media, &probe).unwrap().last().unwrap().unwrap();
        // The green of the third row from the top: white behind the waveform, dark in it.
        let is_tall = |column: usize| last.rgb[(3 * 96 + 48 + column) * 3 + 1] < 160;
        assert_eq!((is_tall(10), is_tall(34)), (!is_first_quiet, is_first_quiet), "{}", path.display());
    }
}
