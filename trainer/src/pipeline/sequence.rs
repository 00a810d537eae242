//! A network on several devices, each of which has all of it and computes a part of the tokens of a call.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use kernels::Tensor;
use kernels::transfer::{Link, Sent};
use models::dit::sequence::{Exchange, conditioning_of, dealt, positions_of, runs};
use models::dit::{Boundary, Context, NetworkInput, Streams};

use super::calls::{Called, Calls, Returns, StageEnd};
use super::residuals::{Blocks, Residuals};
use super::{Pipeline, Stage};
use crate::error::{Error, Result};

/// The links from each device to each other.
pub(super) type AllToAll = Vec<Vec<Option<Arc<Link>>>>;

/// The ends of one device.
#[derive(Debug)]
struct Peers {
    index: usize,
    /// By device; none to itself.
    to: Vec<Option<Peer>>,
}

#[derive(Debug)]
struct Peer {
    link: Arc<Link>,
    send: Sender<Sent>,
    take: Mutex<Receiver<Sent>>,
}

/// What the first device hands to another of a call: its input, whose shapes are read, and its tokens with their conditioning.
struct Handed {
    input: NetworkInput,
    tokens: Vec<Range<usize>>,
    boundary: Boundary<Sent>,
}

/// Where the first device hands calls on, by device but itself.
type Hands = Vec<(Arc<Link>, Sender<Handed>)>;

/// A call as one device sees it.
struct Part {
    input: NetworkInput,
    tokens: Vec<Range<usize>>,
    boundary: Boundary,
    /// On the first device: what the head reads.
    whole: Option<Context>,
}

/// The exchange of a call.
#[derive(Debug)]
struct Dealt {
    peers: Arc<Peers>,
    tokens: Vec<Range<usize>>,
    heads: Vec<Range<usize>>,
}

impl Peer {
    fn send(&self, x: &Tensor) -> models::Result<()> {
        // What the other side received before it sent its last message may go.
        self.link.settle()?;
        self.send.send(self.link.send(x.contiguous()?)?).map_err(|_| models::Error::PeerStopped)
    }

    fn receive(&self) -> models::Result<Tensor> {
        let take = self.take.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(take.recv().map_err(|_| models::Error::PeerStopped)?.receive()?)
    }
}

impl Dealt {
    /// Sends every other device its run of `x` along `axis`, and joins what comes from all along `onto`.
    fn exchange(
        &self,
        x: &Tensor,
        (axis, runs): (usize, &[Range<usize>]),
        onto: usize,
    ) -> models::Result<Tensor> {
        let Peers { index, to } = &*self.peers;
        let run = |part: usize| x.narrow(axis, runs[part].start, runs[part].len());
        for (part, peer) in to.iter().enumerate() {
            peer.as_ref().map_or(Ok(()), |peer| peer.send(&run(part)?))?;
        }
        let parts = to.iter().enumerate().map(|(part, peer)| match peer {
            Some(peer) => peer.receive(),
            None if part == *index => Ok(run(part)?.contiguous()?),
            None => Err(models::Error::PeerStopped),
        });
        Ok(Tensor::cat(&parts.collect::<models::Result<Vec<_>>>()?, onto)?)
    }
}

impl Exchange for Dealt {
    fn to_heads(&self, x_blnh: &Tensor) -> models::Result<Tensor> {
        self.exchange(x_blnh, (2, &self.heads), 1)
    }

    fn to_tokens(&self, x_blnh: &Tensor) -> models::Result<Tensor> {
        self.exchange(x_blnh, (1, &self.tokens), 2)
    }
}

impl Pipeline {
    /// Networks that each are on one device, in rows of `sharing` that share the tokens of each call; with 1 they are as they were.
    ///
    /// # Errors
    /// Networks of several stages, rows that are not full, and devices that cannot be linked.
    pub fn in_rows(networks: Vec<Self>, sharing: usize) -> Result<Vec<Self>> {
        if sharing == 1 {
            return Ok(networks);
        }
        if sharing == 0
            || !networks.len().is_multiple_of(sharing)
            || networks.iter().any(|one| one.stages.len() != 1)
        {
            let why = format!("{} networks cannot share tokens in rows of {sharing}", networks.len());
            return Err(kernels::Error::msg(why).into());
        }
        let mut stages: Vec<Vec<Stage>> = Vec::new();
        let route = networks[0].route; // not empty: 0 is a multiple that the loop below never reaches
        for (index, network) in networks.into_iter().enumerate() {
            if index.is_multiple_of(sharing) {
                stages.push(Vec::new());
            }
            if let Some(row) = stages.last_mut() {
                row.extend(network.stages);
            }
        }
        let row = |stages: Vec<Stage>| {
            let link = |from: usize, to: usize| {
                let link = || Link::new(&stages[from].device, &stages[to].device, route);
                (from != to).then(link).transpose().map(|link| link.map(Arc::new))
            };
            let all = (0..sharing)
                .map(|from| (0..sharing).map(|to| link(from, to)).collect::<kernels::Result<_>>());
            let all = all.collect::<kernels::Result<AllToAll>>()?;
            let home = Link::new(&stages[0].device, &stages[0].device, route)?;
            Ok(Self { stages, ways: Vec::new(), home, route, shared: Some(all) })
        };
        stages.into_iter().map(row).collect()
    }

    /// Makes `calls` on devices that share their tokens, linked by `all`.
    pub(super) fn call_in_row<I, O, B>(&self, all: &AllToAll, calls: Calls<I, O, B>) -> Result<Called>
    where
        I: FnMut(usize, &Returns) -> Result<NetworkInput> + Send,
        O: FnMut(usize, Tensor) -> Result<Option<Tensor>> + Send,
        B: Fn(usize) -> Blocks + Sync,
    {
        let Calls { count, input, output, blocks } = calls;
        let (hands, handed): (Vec<_>, Vec<_>) = all[0]
            .iter()
            .flatten()
            .map(|link| {
                let (send, take) = channel();
                ((link.clone(), send), take)
            })
            .unzip();
        let mut peers = peers(all).into_iter();
        let first_peers = peers.next().ok_or_else(|| kernels::Error::msg("a row of no devices"))?;
        let blocks = &blocks;
        let ends: Vec<Result<StageEnd>> = std::thread::scope(|scope| {
            let first = scope.spawn(move || self.lead(count, first_peers, hands, (input, output, blocks)));
            let others = self.stages[1..].iter().zip(peers).zip(handed);
            let others: Vec<_> = others
                .map(|((stage, peers), handed)| {
                    scope.spawn(move || follow(stage, count, peers, &handed, blocks))
                })
                .collect();
            let threads = std::iter::once(first).chain(others);
            threads.map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        self.called(super::own_error(ends)?)
    }

    /// What the first device does: it makes the inputs, embeds, and has the head.
    fn lead<I, O, B>(
        &self,
        count: usize,
        peers: Peers,
        hands: Hands,
        (mut input, mut output, blocks): (I, O, &B),
    ) -> Result<StageEnd>
    where
        I: FnMut(usize, &Returns) -> Result<NetworkInput>,
        O: FnMut(usize, Tensor) -> Result<Option<Tensor>>,
        B: Fn(usize) -> Blocks,
    {
        let stage = &self.stages[0]; // of a row
        let (sender, receiver) = channel();
        let (returns, peers, mut residuals) = (Returns { receiver }, Arc::new(peers), Residuals::default());
        for m in 0..count {
            let part = stage.deal(input(m, &returns)?.to_device(&stage.device)?, &hands)?;
            let (own, whole) = stage.share(part, &peers, (m, blocks(m)), &mut residuals)?;
            let (Some(head), Some(whole)) = (&stage.dit.head, whole) else {
                return Err(kernels::Error::msg("the first device of a row has no head").into());
            };
            let others = peers.to.iter().flatten().map(Peer::receive);
            let parts = std::iter::once(Ok(own)).chain(others).collect::<models::Result<Vec<_>>>()?;
            let x_bld = Tensor::cat(&parts, 1)?;
            drop(parts);
            let velocity = head.forward(&x_bld, &whole)?;
            drop(x_bld);
            if let Some(back) = output(m, velocity)? {
                self.home.settle()?;
                // Where nobody takes it any more, `returns` is gone, and this thread with it.
                let _ = sender.send(self.home.send(back)?);
            }
        }
        drop(sender);
        Ok(StageEnd { returns: Some(returns), changes: residuals.changes })
    }
}

/// What every other device does.
fn follow(
    stage: &Stage,
    count: usize,
    peers: Peers,
    handed: &Receiver<Handed>,
    blocks: impl Fn(usize) -> Blocks,
) -> Result<StageEnd> {
    let (peers, mut residuals) = (Arc::new(peers), Residuals::default());
    for m in 0..count {
        let Handed { input, tokens, boundary } = handed.recv().map_err(|_| Error::NeighbourStopped)?;
        let boundary = boundary.try_map(Sent::receive)?;
        let part = Part { input, tokens, boundary, whole: None };
        let (own, _) = stage.share(part, &peers, (m, blocks(m)), &mut residuals)?;
        peers.to[0].as_ref().map_or(Ok(()), |first| first.send(&own))?;
    }
    Ok(StageEnd { returns: None, changes: Vec::new() })
}

impl Stage {
    /// Embeds `input`, hands every other device its tokens, and keeps the first ones.
    fn deal(&self, input: NetworkInput, hands: &Hands) -> Result<Part> {
        let (streams, whole) = self.entry(&input, Some(input.clone()), None)?;
        if streams.sides().next().is_some() {
            return Err(kernels::Error::msg("side streams are not dealt out to devices").into());
        }
        let all = streams.main.dim(1)?;
        let tokens = dealt(all, &whole.cond, hands.len() + 1)?;
        let boundary = |own: &Range<usize>| -> Result<Boundary> {
            let main = streams.main.narrow(1, own.start, own.len())?.contiguous()?;
            let cond = conditioning_of(whole.cond.clone(), own, all)?;
            Ok(Boundary { streams: Streams::new(main), cond })
        };
        for ((link, send), own) in hands.iter().zip(&tokens[1..]) {
            link.settle()?;
            let boundary = boundary(own)?.try_map(|tensor| link.send(tensor))?;
            let handed = Handed { input: input.clone(), tokens: tokens.clone(), boundary };
            send.send(handed).map_err(|_| Error::NeighbourStopped)?;
        }
        let boundary = boundary(&tokens[0])?;
        Ok(Part { input, tokens, boundary, whole: Some(whole) })
    }

    /// The own tokens of `part` behind all blocks, in call `m`.
    fn share(
        &self,
        Part { input, tokens, boundary, whole }: Part,
        peers: &Arc<Peers>,
        (m, blocks): (usize, Blocks),
        residuals: &mut Residuals,
    ) -> Result<(Tensor, Option<Context>)> {
        if matches!(blocks, Blocks::Measure { .. }) {
            return Err(kernels::Error::msg("residuals are not measured where devices share tokens").into());
        }
        let Boundary { streams, cond } = boundary;
        let mut context = self.dit.context(cond, &input, &self.device)?;
        context.positions = positions_of(&context.positions, &tokens[peers.index])?;
        let heads = runs(self.dit.config.heads, tokens.len(), "heads")?;
        context.exchange = Some(Arc::new(Dealt { peers: peers.clone(), tokens, heads }));
        let streams = residuals.through(self, streams, &context, (m, blocks))?;
        Ok((streams.main, whole))
    }
}

/// The ends of each device.
fn peers(all: &AllToAll) -> Vec<Peers> {
    let count = all.len();
    let mut ends: Vec<Peers> =
        (0..count).map(|index| Peers { index, to: (0..count).map(|_| None).collect() }).collect();
    for a in 0..count {
        for b in 0..a {
            let ((to_b, from_a), (to_a, from_b)) = (channel(), channel());
            if let (Some(onward), Some(back)) = (&all[a][b], &all[b][a]) {
                ends[a].to[b] = Some(Peer { link: onward.clone(), send: to_b, take: Mutex::new(from_b) });
                ends[b].to[a] = Some(Peer { link: back.clone(), send: to_a, take: Mutex::new(from_a) });
            }
        }
    }
    ends
}
