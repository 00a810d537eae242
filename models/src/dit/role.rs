//! The roles of conditioning.

use std::cmp::Ordering;
use std::fmt;

/// What a tensor conditions the network on. Roles are equal when their names are.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    name: &'static str,
    /// Its description and source, for messages.
    what: &'static str,
    residence: Residence,
    rows: Rows,
}

/// Where a raw tensor is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Residence {
    Host,
    Device,
}

/// How samples with different numbers of rows are batched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    Equal,
    Padded,
}

impl Role {
    /// 1000 * sigma, `[b]` or `[b, tokens]` f32. Raw; the embedding reads it on the host.
    pub const TIMESTEP: Self = Self::new("timestep", "the timestep").on_host();
    /// Raw: states of the text encoder, [b, s, text_dim]. Embedded: [b, text_len, d].
    pub const TEXT: Self = Self::new("text", "the text encoder's states (context)").padded();
    /// Raw: CLIP's states of each sample's picture, [b, s, width]. Embedded: [b, s, d].
    pub const PICTURE: Self = Self::new("picture", "CLIP's states of a picture (clip_fea)");
    /// Embedded: the time embedding e [b, g, d] f32, which the head modulates by; g groups of tokens share a timestep.
    pub const TIME: Self = Self::new("time", "the time embedding");
    /// Embedded: the projected time embedding e0 [b, g, 6, d] f32, which the blocks modulate by.
    pub const MODULATION: Self = Self::new("modulation", "the projected time embedding");

    /// A role that is read on the device, with the same number of rows in every sample of a batch. `what` describes it in
    /// messages, with its source.
    pub const fn new(name: &'static str, what: &'static str) -> Self {
        Self { name, what, residence: Residence::Device, rows: Rows::Equal }
    }

    /// The same role, its raw tensor read on the host and never copied to a device.
    pub const fn on_host(self) -> Self {
        Self { residence: Residence::Host, ..self }
    }

    /// Whether its raw tensor stays on the host.
    pub fn is_on_host(self) -> bool {
        self.residence == Residence::Host
    }

    /// The same role, with the shorter samples of a batch padded with zero rows.
    pub const fn padded(self) -> Self {
        Self { rows: Rows::Padded, ..self }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.name
    }

    pub(super) fn residence(self) -> Residence {
        self.residence
    }

    pub(super) fn rows(self) -> Rows {
        self.rows
    }

    /// Its description and source.
    pub fn what(self) -> &'static str {
        self.what
    }
}

impl PartialEq for Role {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Role {}

impl PartialOrd for Role {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Role {
    fn cmp(&self, other: &Self) -> Ordering {
        self.name.cmp(other.name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}
