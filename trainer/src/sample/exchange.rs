//! What groups of devices exchange about a clip of which each computes a half of the guidance: velocities one way, the latents
//! behind a step the other.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use kernels::Tensor;
use kernels::transfer::{Link, Sent};

use crate::error::{Error, Result};
use crate::pipeline::Pipeline;

/// The ends of one group, by clip.
#[derive(Default)]
pub(super) struct Ends {
    /// Of clips whose steps are taken here, and whose other half is computed elsewhere; used by the last stage.
    pub home: BTreeMap<usize, Home>,
    /// Of clips of which a half is computed here for another group; used by the last stage.
    pub away: BTreeMap<usize, Away>,
    /// Where latents of the latter arrive; used by the first stage.
    pub arriving: BTreeMap<usize, Receiver<Sent>>,
}

/// Where the steps of a clip are taken.
pub(super) struct Home {
    velocities: Receiver<Sent>,
    latents: Sender<Sent>,
    link: Arc<Link>,
}

/// Where the other half of a clip is computed.
pub(super) struct Away {
    velocities: Sender<Sent>,
    link: Arc<Link>,
}

/// The links between two groups.
struct Links {
    /// From the last stage of the one that computes a half to the last stage of the one that takes the steps.
    velocities: Arc<Link>,
    /// From the latter to the first stage of the former.
    latents: Arc<Link>,
}

/// Connects `groups` for clips that each belong to two of them: (clip, group that takes the steps, group of the other half). The
/// ends of each group, and the links, to be settled when all groups are done.
///
/// # Errors
/// When two devices cannot be linked.
pub(super) fn between(
    groups: &[Pipeline],
    shared: &[(usize, usize, usize)],
) -> Result<(Vec<Ends>, Vec<Arc<Link>>)> {
    let mut ends: Vec<Ends> = groups.iter().map(|_| Ends::default()).collect();
    let mut links: BTreeMap<(usize, usize), Links> = BTreeMap::new();
    for &(clip, home, away) in shared {
        let Links { velocities: of_velocities, latents: of_latents } = match links.entry((home, away)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Links::new(&groups[home], &groups[away])?),
        };
        let ((send_velocity, velocities), (latents, arriving)) = (channel(), channel());
        ends[home].home.insert(clip, Home { velocities, latents, link: of_latents.clone() });
        ends[away].away.insert(clip, Away { velocities: send_velocity, link: of_velocities.clone() });
        ends[away].arriving.insert(clip, arriving);
    }
    Ok((ends, links.into_values().flat_map(|links| [links.velocities, links.latents]).collect()))
}

impl Links {
    fn new(home: &Pipeline, away: &Pipeline) -> Result<Self> {
        let ([_, home_last], [away_first, away_last]) = (home.ends(), away.ends());
        let link = |from, to| Ok::<_, Error>(Arc::new(Link::new(from, to, home.route())?));
        Ok(Self { velocities: link(away_last, home_last)?, latents: link(home_last, away_first)? })
    }
}

impl Home {
    /// The velocity of the other half; waits for the other group to make it, but not for its device.
    pub fn take_velocity(&self) -> Result<Tensor> {
        let sent = self.velocities.recv().map_err(|_| Error::NeighbourStopped)?;
        Ok(sent.receive()?)
    }

    /// Hands the latents behind a step to the other group.
    pub fn send_latents(&self, latents: Tensor) -> Result<()> {
        self.link.settle()?;
        self.latents.send(self.link.send(latents)?).map_err(|_| Error::NeighbourStopped)
    }
}

impl Away {
    /// Hands the velocity of a half to the group that takes the steps.
    pub fn send_velocity(&self, velocity: Tensor) -> Result<()> {
        self.link.settle()?;
        self.velocities.send(self.link.send(velocity)?).map_err(|_| Error::NeighbourStopped)
    }
}
