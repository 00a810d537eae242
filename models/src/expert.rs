//! The two experts of a Wan 2.2 A14B model.

use serde::{Deserialize, Serialize};

/// One of two networks of the same sizes, one for the noise levels above the boundary and one for those below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expert {
    /// For high noise: where sampling begins. `high_noise_model`, and diffusers' `transformer`.
    High,
    /// For low noise: where sampling ends. `low_noise_model`, and diffusers' `transformer_2`.
    Low,
}

/// How many networks a model has for its noise levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Networks {
    /// One for all noise levels, or an expert without the other.
    Whole,
    /// Two experts.
    Pair,
}

impl Expert {
    /// Both, in the order in which sampling uses them.
    pub const ALL: [Self; 2] = [Self::High, Self::Low];

    /// As recipes write it: `high`, `low`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Low => "low",
        }
    }

    /// The suffix of the names of its files: `high_noise`, `low_noise`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::High => "high_noise",
            Self::Low => "low_noise",
        }
    }

    /// The expert in the name of a file or folder: `high_noise_model`, `wan2.2_t2v_low_noise_14B_fp16`, `Wan22-I2V-HIGH`; `None`
    /// if the name has none, or both.
    pub fn in_name(name: &str) -> Option<Self> {
        let name = name.to_lowercase();
        let words: Vec<&str> = name.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        // "high" alone may mean anything; in the name of a model of two experts it means one of them.
        let is_a14b = ["2.2", "2_2", "22", "a14b"].iter().any(|mark| name.contains(mark));
        let tells = |expert: Self| {
            words.iter().enumerate().any(|(i, word)| match word.strip_prefix(expert.name()) {
                Some("") => is_a14b || words.get(i + 1).is_some_and(|next| next.starts_with("noise")),
                Some(rest) => rest.starts_with("noise"),
                None => false,
            })
        };
        match (tells(Self::High), tells(Self::Low)) {
            (true, false) => Some(Self::High),
            (false, true) => Some(Self::Low),
            _ => None,
        }
    }
}

impl std::fmt::Display for Expert {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
