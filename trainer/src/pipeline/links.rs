//! What lies between stages: the ways from device to device, and the channels that hand over what is on its way.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use kernels::Device;
use kernels::transfer::{Link, Route, Sent};
use models::dit::{Boundary, Streams};

use crate::error::{Error, Result};

/// The ways between the devices of two neighbouring stages.
#[derive(Debug)]
pub(super) struct Ways {
    onward: Link,
    back: Link,
}

/// The links of one stage to its neighbours. The ends of the chain have none on their outer side.
pub(super) struct Links<'a> {
    /// Which stage it is.
    pub index: usize,
    previous: Option<Previous<'a>>,
    next: Option<Next<'a>>,
}

struct Previous<'a> {
    back: &'a Link,
    take: Receiver<Boundary<Sent>>,
    send: Sender<Streams<Sent>>,
}

struct Next<'a> {
    onward: &'a Link,
    send: SyncSender<Boundary<Sent>>,
    take: Receiver<Streams<Sent>>,
}

impl Ways {
    /// The ways between stages on `devices`, in order.
    ///
    /// # Errors
    /// When two devices cannot be linked.
    pub fn between(devices: &[&Device], route: Route) -> Result<Vec<Self>> {
        let pair = |pair: &[&Device]| {
            let (onward, back) = (Link::new(pair[0], pair[1], route)?, Link::new(pair[1], pair[0], route)?);
            Ok(Self { onward, back })
        };
        devices.windows(2).map(pair).collect()
    }

    /// Both directions.
    pub fn links(&self) -> [&Link; 2] {
        [&self.onward, &self.back]
    }
}

impl<'a> Links<'a> {
    /// The links of the stages that lie at the ends of `ways`.
    pub fn chain(ways: &'a [Ways]) -> Vec<Self> {
        let mut links: Vec<Self> =
            (0..=ways.len()).map(|index| Self { index, previous: None, next: None }).collect();
        for (i, Ways { onward, back }) in ways.iter().enumerate() {
            // Streams take memory until they are received. In a training step a stage is as far ahead as there are stages behind
            // it, by its schedule; without a backward only this holds it back.
            let (send, take) = sync_channel(ways.len() + 1);
            let (send_back, take_back) = channel();
            links[i].next = Some(Next { onward, send, take: take_back });
            links[i + 1].previous = Some(Previous { back, take, send: send_back });
        }
        links
    }

    /// What the previous stage handed over, on this device; nothing on the first stage.
    pub fn take_forward(&self) -> Result<Option<Boundary>> {
        let Some(previous) = &self.previous else { return Ok(None) };
        let sent = previous.take.recv().map_err(|_| Error::NeighbourStopped)?;
        previous.back.settle()?;
        Ok(Some(sent.try_map(Sent::receive)?))
    }

    /// The gradients of the streams that the next stage sent back, on this device; nothing on the last stage.
    pub fn take_backward(&self) -> Result<Option<Streams>> {
        let Some(next) = &self.next else { return Ok(None) };
        let sent = next.take.recv().map_err(|_| Error::NeighbourStopped)?;
        // The gradient of what was sent says that it arrived.
        next.onward.settle()?;
        Ok(Some(sent.try_map(Sent::receive)?))
    }

    /// Hands the streams and their conditioning to the next stage.
    pub fn send_forward(&self, boundary: Boundary) -> Result<()> {
        let Some(Next { onward, send, .. }) = &self.next else { return Ok(()) };
        onward.settle()?;
        let sent = boundary.try_map(|tensor| onward.send(tensor))?;
        send.send(sent).map_err(|_| Error::NeighbourStopped)
    }

    /// Hands the gradients of the streams to the stage before.
    pub fn send_backward(&self, d_streams: Streams) -> Result<()> {
        let Some(Previous { back, send, .. }) = &self.previous else { return Ok(()) };
        back.settle()?;
        let sent = d_streams.try_map(|tensor| back.send(tensor))?;
        send.send(sent).map_err(|_| Error::NeighbourStopped)
    }
}
