//! Choosing source frames by time, so that every clip plays at the model's rate without speeding up or slowing down.

/// Two candidate frames count as equally near when their distances differ by less than this, in seconds; then the earlier
/// one is taken. Otherwise 24 to 16 frames a second, where every second choice is a tie, would depend on rounding.
const TIE_S: f64 = 1e-6;

/// Frames of a clip of `end` seconds at `fps`: the whole number nearest to duration times rate, at least 1.
pub fn frame_count(end: f64, fps: f64) -> usize {
    // A float-to-integer cast saturates, so an absurd duration gives an absurd count, not undefined behaviour.
    (end * fps).round().max(1.0) as usize
}

/// For each target frame `start..start + length` at `fps`, the index of the source frame whose time is nearest; but a
/// coming frame is used at most half a target frame early, so that a picture that is shown for seconds keeps its duration.
/// `times` ascend from 0, in seconds, and hold at least one.
pub fn nearest_frames(times: &[f64], fps: f64, start: usize, length: usize) -> Vec<usize> {
    let nearest = |target: f64| {
        let coming = times.partition_point(|&time| time <= target);
        let shown = coming.saturating_sub(1);
        let is_nearer = |&time: &f64| {
            let (wait, age) = (time - target, target - times[shown]);
            wait + TIE_S < age && wait <= 0.5 / fps
        };
        if times.get(coming).is_some_and(is_nearer) { coming } else { shown }
    };
    (start..start + length).map(|frame| nearest(frame as f64 / fps)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_convert_by_time() {
        let at =
            |fps: f64, count: usize| -> Vec<f64> { (0..count).map(|index| index as f64 / fps).collect() };
        assert_eq!(nearest_frames(&at(16.0, 5), 16.0, 0, 5), [0, 1, 2, 3, 4]);
        assert_eq!(nearest_frames(&at(32.0, 9), 16.0, 1, 3), [2, 4, 6]);
        assert_eq!(nearest_frames(&at(24.0, 9), 16.0, 0, 6), [0, 1, 3, 4, 6, 7]);
        assert_eq!(nearest_frames(&at(8.0, 3), 16.0, 0, 6), [0, 0, 1, 1, 2, 2]);
        // A picture that is shown for a second is repeated for all of it.
        assert_eq!(nearest_frames(&[0.0, 0.25, 1.25], 4.0, 0, 6), [0, 1, 1, 1, 1, 2]);
        assert_eq!((frame_count(1.0, 16.0), frame_count(0.0, 16.0)), (16, 1));
    }
}
