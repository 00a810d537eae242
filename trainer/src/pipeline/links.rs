//! The connections between stages: links from device to device, and channels for the tensors under way.

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

/// How many boundaries may wait between two of so many stages. Streams take memory until they are received: in a training
/// step a stage is as far ahead as there are stages behind it, by its schedule; without a backward only this holds it back.
pub(super) fn waiting(stages: usize) -> usize {
    stages
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

/// The neighbours' ends of the links of a stage that is alone.
pub(super) struct Ends {
    /// Takes what the stage's next forward begins with.
    pub to_forward: Option<Sender<Boundary<Sent>>>,
    /// Takes the gradients that the stage's next backward begins with.
    pub to_backward: Option<Sender<Streams<Sent>>>,
    /// What the stage hands on.
    pub of_forward: Option<Receiver<Boundary<Sent>>>,
    /// The gradients that it hands back.
    pub of_backward: Option<Receiver<Streams<Sent>>>,
}

impl<'a> Links<'a> {
    /// The links of one stage without the others: `back` goes to the stage before, `onward` to the next.
    pub fn alone(back: Option<&'a Link>, onward: Option<&'a Link>) -> (Self, Ends) {
        let mut links = Self { index: 0, previous: None, next: None };
        let mut ends = Ends { to_forward: None, to_backward: None, of_forward: None, of_backward: None };
        if let Some(back) = back {
            let ((to_forward, take), (send, of_backward)) = (channel(), channel());
            links.previous = Some(Previous { back, take, send });
            (ends.to_forward, ends.of_backward) = (Some(to_forward), Some(of_backward));
        }
        if let Some(onward) = onward {
            let ((send, of_forward), (to_backward, take)) = (sync_channel(1), channel());
            links.next = Some(Next { onward, send, take });
            (ends.of_forward, ends.to_backward) = (Some(of_forward), Some(to_backward));
        }
        (links, ends)
    }

    /// The links of the stages that lie at the ends of `ways`.
    pub fn chain(ways: &'a [Ways]) -> Vec<Self> {
        let mut links: Vec<Self> =
            (0..=ways.len()).map(|index| Self { index, previous: None, next: None }).collect();
        for (i, Ways { onward, back }) in ways.iter().enumerate() {
            let (send, take) = sync_channel(waiting(ways.len() + 1));
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
