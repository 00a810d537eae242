//! What may be wrong with clips is found, and nothing in those that are fine.

use data::{DataConfig, Dataset, Film, Finding, SizeMultiple, check, write_webp};
use proofs::film::{SCENE_SIZE as SIZE, grey, scene};

const RATE: f64 = 16.0;
/// A film of scenes.
fn film(frames: usize, of: impl Fn(usize, u32, u32) -> u8) -> Film {
    grey(SIZE, frames, of)
}

#[test]
fn what_may_be_wrong_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let clips: Vec<(&str, Film)> = vec![
        ("a_fine", film(24, scene(1))),
        ("b_black", film(24, |t, x, y| if t < 6 { 3 } else { scene(2)(t, x, y) })),
        ("c_frozen", film(24, |_, x, y| scene(3)(0, x, y))),
        ("d_slow", film(24, |t, x, y| scene(4)(t / 2 * 2, x, y))),
        ("e_cut", film(24, |t, x, y| if t < 10 { scene(5)(t, x, y) } else { 255 - scene(5)(t, x, y) / 3 })),
        ("f_bars", film(24, |t, x, y| if (8..56).contains(&y) { scene(7)(t, x, y) } else { 4 })),
        ("g_again", film(24, |t, x, y| scene(1)(t, x, y).saturating_add(9))),
        ("h_also_fine", film(24, scene(8))),
    ];
    for (name, film) in &clips {
        write_webp(&folder.path().join(format!("{name}.webp")), film, RATE).unwrap();
        std::fs::write(folder.path().join(format!("{name}.txt")), *name).unwrap();
    }
    let built = |width: u32, height: u32| {
        let text = format!(
            "{{\"folder\": {:?}, \"sizes\": [[{width}, {height}]], \"frames\": [17]}}",
            folder.path()
        );
        let config: DataConfig = serde_json::from_str(&text).unwrap();
        Dataset::build(&config, SizeMultiple::new(16), RATE, &mut |_, _| {}).unwrap()
    };
    let checked = check(&built(96, 64), &mut || Ok(())).unwrap();
    let found: Vec<(&str, &[Finding])> =
        checked.iter().map(|clip| (clip.id.trim_end_matches(".webp"), clip.findings.as_slice())).collect();
    assert!(checked.iter().all(|clip| clip.shown.len() == 4), "four pictures of each");
    for (name, findings) in found {
        let is_right = match name {
            "a_fine" | "h_also_fine" => findings.is_empty(),
            "b_black" => findings == [Finding::Black { share: 0.25 }],
            "c_frozen" => findings == [Finding::Frozen],
            "d_slow" => {
                matches!(findings, [Finding::Repeated { share }] if (share - 12.0 / 23.0).abs() < 0.05)
            }
            "e_cut" => {
                matches!(findings, [Finding::Cuts { seconds }] if seconds.len() == 1 && (seconds[0] - 10.0 / RATE).abs() < 0.01)
            }
            "f_bars" => findings == [Finding::Bars { left: 0, right: 0, top: 8, bottom: 8 }],
            _ => findings == [Finding::Twin { of: "a_fine.webp".to_owned() }],
        };
        assert!(is_right, "{name}: {findings:?}");
    }
    let larger = check(&built(192, 128), &mut || Ok(())).unwrap();
    assert_eq!(larger[0].findings, [Finding::Enlarged { factor: 2.0 }]);
}
