//! The estimate of the time of sampling: counted by hand here, and reported before anything is loaded.

use std::time::Duration;

use models::dit::DitConfig;
use trainer::sample::estimate::{in_words, operations};
use trainer::tools::bench::dit_preset;
use trainer::watch::ui::time_left;

/// Two operations for each weight of the blocks' matrices and each token (keys and values of the text: each of its rows), and
/// for both products of each attention.
fn counted(dit: &DitConfig, tokens: f64) -> f64 {
    let text = dit.text_len as f64;
    let of_module = |(name, out, input): (String, usize, usize)| {
        let rows = match name.contains("cross_attn.k") || name.contains("cross_attn.v") {
            true => text,
            false => tokens,
        };
        2.0 * rows * (out * input) as f64
    };
    let products: f64 = dit.adaptable_modules().into_iter().map(of_module).sum();
    let attention = 4.0 * tokens * (tokens + text) * dit.dim as f64;
    products + attention * dit.layers as f64
}

#[test]
fn the_operations_of_a_network_are_counted() {
    for name in ["t2v-1.3b", "t2v-14b", "ti2v-5b"] {
        let dit = dit_preset(name).unwrap();
        for tokens in [512, 32760] {
            let [products, attention] = operations(&dit, tokens);
            let (told, counted) = (products + attention, counted(&dit, tokens as f64));
            assert!((told / counted - 1.0).abs() < 1e-9, "{name}, {tokens}: {told:e} against {counted:e}");
        }
    }
}

#[test]
fn times_are_told_in_words() {
    for (seconds, words) in [(0, "1 s"), (59, "59 s"), (60, "1 min"), (3599, "60 min"), (12000, "3 h 20 min")]
    {
        assert_eq!(in_words(Duration::from_secs(seconds)), words);
    }
    assert_eq!(time_left(Duration::ZERO, false), "--:--:--");
    assert_eq!(time_left(Duration::ZERO, true), "00:00:00");
    assert_eq!(time_left(Duration::from_secs(3661), false), "01:01:01");
}
