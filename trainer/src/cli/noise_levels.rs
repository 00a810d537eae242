//! The noise levels of a plan as bars in a terminal.

use crate::plan::NoiseLevels;

/// Letters of the longest bar.
const WIDTH: f64 = 40.0;
/// The eighths of a letter.
const EIGHTHS: [&str; 8] =
    ["", "\u{258f}", "\u{258e}", "\u{258d}", "\u{258c}", "\u{258b}", "\u{258a}", "\u{2589}"];
/// A whole letter.
const WHOLE: &str = "\u{2588}";

/// A line for each part of 0..1, from noise to signal, with what it counts for where that differs.
pub fn in_bars(levels: &[NoiseLevels]) -> String {
    levels.iter().map(of_network).collect()
}

fn of_network(levels: &NoiseLevels) -> String {
    let NoiseLevels { expert, sigmas, share, weighted } = levels;
    let of = expert.map(|expert| format!(" of the expert for {expert} noise")).unwrap_or_default();
    let is_weighted = share.iter().zip(weighted).any(|(share, weighted)| (share - weighted).abs() > 1e-6);
    let weight = if is_weighted { ", and of their weight (train.timesteps.weighting)" } else { "" };
    let mut text = format!("noise levels{of}: share of the samples{weight}\n");
    let most = share.iter().chain(weighted).fold(0.0f64, |most, share| most.max(*share));
    for part in (0..share.len()).rev().filter(|part| share[*part] > 0.0) {
        let range = format!("{:.2} .. {:.2}", sigmas[part], sigmas[part + 1]);
        let mut line = format!("  sigma {range} {:>5.1} %", 100.0 * share[part]);
        if is_weighted {
            line.push_str(&format!(" {:>5.1} %", 100.0 * weighted[part]));
        }
        line.push_str(&format!("  {}", bar(share[part] / most)));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A bar of the part `part` of the longest one.
fn bar(part: f64) -> String {
    let eighths = (part * WIDTH * 8.0).round() as usize;
    WHOLE.repeat(eighths / 8) + EIGHTHS[eighths % 8]
}
