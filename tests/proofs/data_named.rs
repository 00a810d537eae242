//! Companions that dataset files and metadata name for each clip, in place of folders.

use std::fs;
use std::path::Path;

use data::{COMPANION_KEYS, DataConfig, Dataset, SizeMultiple, Takes, Watch, write_webp};
use proofs::film::drifting;
use proofs::{assert_same_bits, device};
use serde_json::{Value, json};
use tempfile::TempDir;
use trainer::encode::LeftOut;

use crate::control_training::{Desk, save};

/// Clips `a` and `b` of 9 frames with captions, `depth/a` and `depth/b` as long, and the pictures `ref0.png` and `ref1.png`.
fn desk() -> TempDir {
    let desk = tempfile::tempdir().unwrap();
    for folder in ["clips", "depth"] {
        fs::create_dir(desk.path().join(folder)).unwrap();
        for name in ["a", "b"] {
            let path = desk.path().join(folder).join(name);
            write_webp(&path.with_extension("webp"), &drifting(64, 32, 9), 16.0).unwrap();
            fs::write(path.with_extension("txt"), format!("clip {name}")).unwrap();
        }
    }
    for name in ["ref0.png", "ref1.png"] {
        save(&drifting(40, 40, 1), &desk.path().join(name));
    }
    desk
}

/// The dataset of `config` for a model that reads the companions of `keys`.
fn built(config: &Value, keys: &[&'static str]) -> data::Result<Dataset> {
    let config: DataConfig = serde_json::from_value(config.clone()).unwrap();
    let model = Takes { multiple: SizeMultiple::new(16), fps: 16.0, companions: keys };
    let mut watch = Watch { progress: &mut |_, _| {}, is_stopped: &|| false, cache: None };
    Dataset::build_watched(&config, &model, &mut watch)
}

/// The dataset of the file `name` with this text.
fn imported(desk: &TempDir, (name, text): (&str, &str), keys: &[&'static str]) -> data::Result<Dataset> {
    let path = desk.path().join(name);
    fs::write(&path, text).unwrap();
    built(&json!({ "import": path, "sizes": [[32, 32]], "frames": [5] }), keys)
}

/// Each clip with the names of its control clip and of its reference pictures.
fn companions(dataset: &Dataset) -> Vec<(String, Option<String>, Vec<String>)> {
    let name = |path: &Path| {
        let folder = path.parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
        format!("{folder}/{}", path.file_name().unwrap().to_string_lossy())
    };
    let of = |source: &data::Source| {
        let own = &source.companions;
        let control = own.control.as_ref().map(|control| name(control.media.path()));
        let references =
            own.references.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned());
        (source.item.id.clone(), control, references.collect())
    };
    dataset.sources.iter().map(of).collect()
}

fn of(id: &str, control: Option<&str>, references: &[&str]) -> (String, Option<String>, Vec<String>) {
    let references = references.iter().map(|name| (*name).to_owned()).collect();
    (id.to_owned(), control.map(str::to_owned), references)
}

#[test]
fn diffsynths_columns_are_companions_where_the_model_reads_them() {
    let desk = desk();
    let table = (
        "metadata.csv",
        "video,prompt,vace_video,vace_reference_image,camera_control_direction\n\
                  clips/a.webp,one,depth/b.webp,ref0.png,Left\nclips/b.webp,two,,,Up\n",
    );
    let all = imported(&desk, table, &COMPANION_KEYS).unwrap();
    let expected = [of("clips/a.webp", Some("depth/b.webp"), &["ref0.png"]), of("clips/b.webp", None, &[])];
    assert_eq!(companions(&all), expected);
    let notes = all.notes.join("\n");
    assert!(notes.contains("columns are read as data.control of 1, data.references of 1"), "{notes}");
    assert!(notes.contains("no counterpart for camera_control_direction; not used"), "{notes}");
    let none = imported(&desk, table, &["masks"]).unwrap();
    assert_eq!(companions(&none), [of("clips/a.webp", None, &[]), of("clips/b.webp", None, &[])]);
    assert!(none.notes.join("\n").contains("vace_video, vace_reference_image, camera"), "{:?}", none.notes);
    let lines = (
        "list.jsonl",
        "{\"video\": \"clips/a.webp\", \"prompt\": \"one\", \"control_video\": null, \
                  \"reference_image\": [\"ref1.png\", \"ref0.png\"]}\n",
    );
    let all = imported(&desk, lines, &COMPANION_KEYS).unwrap();
    assert_eq!(companions(&all), [of("clips/a.webp", None, &["ref1.png", "ref0.png"])]);
}

#[test]
fn columns_that_cannot_be_meant_are_refused_by_line() {
    let desk = desk();
    let refused = |row: &str| {
        let table =
            format!("video,prompt,control_video,vace_video,reference_image\nclips/a.webp,one,{row}\n");
        imported(&desk, ("metadata.csv", &table), &COMPANION_KEYS).unwrap_err().to_string()
    };
    let text = refused("depth/a.webp,depth/b.webp,");
    assert!(text.contains("line 2") && text.contains("several files as data.control"), "{text}");
    let text = refused("depth/none.webp,,");
    assert!(text.contains("none.webp") && text.contains("named as data.control of clips/a.webp"), "{text}");
    assert!(refused(",,none.png").contains("named as a reference picture of clips/a.webp"));
    assert!(refused("ref0.png,,").contains("must have the clips' aspect"));
    let lines = ("list.jsonl", "{\"video\": \"clips/a.webp\", \"prompt\": \"one\", \"control_video\": 3}\n");
    let text = imported(&desk, lines, &COMPANION_KEYS).unwrap_err().to_string();
    assert!(text.contains("line 1") && text.contains("\"control_video\" is neither"), "{text}");
    imported(&desk, lines, &[]).unwrap();
}

/// A folder with everything in one place: what metadata names as a companion is no clip without a caption.
#[test]
fn metadata_of_a_folder_names_companions_beside_their_clips() {
    let desk = desk();
    let clips = desk.path().join("clips");
    fs::copy(desk.path().join("depth/a.webp"), clips.join("a_depth.webp")).unwrap();
    fs::write(clips.join("metadata.csv"), "file_name,text,control\na.webp,one,./a_depth.webp\nb.webp,two,\n")
        .unwrap();
    let config = json!({ "folder": clips, "sizes": [[32, 32]], "frames": [5], "captions": "metadata" });
    let all = built(&config, &COMPANION_KEYS).unwrap();
    assert_eq!(companions(&all), [of("a.webp", Some("clips/a_depth.webp"), &[]), of("b.webp", None, &[])]);
    let text = built(&config, &[]).unwrap_err().to_string();
    assert!(text.contains("without a caption") && text.contains("a_depth.webp"), "{text}");
    // A folder is for those clips whose row names none.
    let mut with_folder = config;
    with_folder["control"] = json!(desk.path().join("depth"));
    let all = built(&with_folder, &COMPANION_KEYS).unwrap();
    let expected = [of("a.webp", Some("clips/a_depth.webp"), &[]), of("b.webp", Some("depth/b.webp"), &[])];
    assert_eq!(companions(&all), expected);
}

#[test]
fn control_folders_of_musubi_and_diffusion_pipe_are_read() {
    let desk = desk();
    let musubi = "[general]\nresolution = [32, 32]\n[[datasets]]\nvideo_directory = \"clips\"\ntarget_frames = [5]\n\
                  control_directory = \"depth\"\n";
    let pipe = "resolutions = [32]\nframe_buckets = [5]\n[[directory]]\npath = \"clips\"\ncontrol_path = \"depth\"\n";
    for (name, text, ids) in [
        ("musubi.toml", musubi, ["0-5/a.webp", "0-5/b.webp"]),
        ("pipe.toml", pipe, ["0-0/a.webp", "0-0/b.webp"]),
    ] {
        let all = imported(&desk, (name, text), &COMPANION_KEYS).unwrap();
        let expected = [of(ids[0], Some("depth/a.webp"), &[]), of(ids[1], Some("depth/b.webp"), &[])];
        assert_eq!(companions(&all), expected, "{name}");
        assert!(!all.notes.join("\n").contains("control_"), "{:?}", all.notes);
        let none = imported(&desk, (name, text), &[]).unwrap();
        assert!(none.notes.join("\n").contains("; not used") && none.sources[0].companions.control.is_none());
        fs::rename(desk.path().join("depth/b.webp"), desk.path().join("b.webp")).unwrap();
        assert!(
            imported(&desk, (name, text), &COMPANION_KEYS).unwrap_err().to_string().contains("there is none")
        );
        fs::rename(desk.path().join("b.webp"), desk.path().join("depth/b.webp")).unwrap();
    }
    fs::write(
        desk.path().join("list.jsonl"),
        "{\"video_path\": \"clips/a.webp\", \"caption\": \"one\", \"control_path\": \"depth/a.webp\"}\n",
    )
    .unwrap();
    let listed = musubi
        .replace("video_directory = \"clips\"", "video_jsonl_file = \"list.jsonl\"")
        .replace("control_directory = \"depth\"\n", "");
    let all = imported(&desk, ("listed.toml", &listed), &COMPANION_KEYS).unwrap();
    assert_eq!(companions(&all), [of("0-5/clips/a.webp", Some("depth/a.webp"), &[])]);
}

/// A Fun-Control model learns the same from a list as from folders; a clip whose row names nothing is refused.
#[test]
fn a_control_model_is_trained_on_what_a_list_names() {
    let folders = Desk::new("fun/control22", "control = \"control\"\nreferences = \"references\"", "");
    let (_, of_folders) = folders.cached();
    let listed = Desk::new("fun/control22", "", "");
    let recipe = fs::read_to_string(listed.project.recipe()).unwrap();
    let recipe = recipe.replace("folder = \"clips\"", "import = \"metadata.csv\"\nsource_fps = 16");
    fs::write(listed.project.recipe(), recipe).unwrap();
    let write = |second: &str| {
        let table = format!(
            "video,prompt,control_video,reference_image\nclips/clip00.webp,a ball,control/clip00.webp,references/clip00.png\n\
             clips/clip01.webp,two birds fly,{second},references/clip01.png\n"
        );
        fs::write(listed.project.root().join("metadata.csv"), table).unwrap();
    };
    write("control/clip01.webp");
    let (planned, of_list) = listed.cached();
    assert_eq!(planned.dataset.sources.len(), 2);
    for index in 0..2 {
        let shown = |encoded: &trainer::encode::LatentStore| {
            let shown = encoded.shown_of_window(index, LeftOut::default()).unwrap();
            shown.beside_bcthw.unwrap().to_device(&device()).unwrap()
        };
        assert_same_bits("control and start picture", &shown(&of_folders), &shown(&of_list));
    }
    write("");
    let Err(error) = listed.plan() else { panic!("a clip without a control clip was not refused") };
    let text = error.to_string();
    assert!(text.contains("data.control") && text.contains("clips/clip01.webp has none"), "{text}");
}
