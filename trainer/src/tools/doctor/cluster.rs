//! What the replicas of a group run on, whether it matches, and how fast they exchange.

use std::collections::BTreeMap;
use std::time::Instant;

use kernels::{DType, Device, Tensor, inventory};
use serde::{Deserialize, Serialize};

use super::{Finding, Standing};
use crate::error::Result;
use crate::replicas::{ReplicaError, Replicas};

/// What a rank runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Report {
    version: String,
    /// GPUs of its replica.
    cards: Vec<String>,
    driver: String,
    nccl: String,
    /// The variables that direct NCCL.
    variables: BTreeMap<String, String>,
}

/// Variables of NCCL that differ between clusters, and that often explain a slow or a missing link.
const VARIABLES: [&str; 5] =
    ["CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_NVLS_ENABLE"];

impl Report {
    fn of(stages: &[String]) -> Self {
        let gpus = inventory::gpus().unwrap_or_default();
        let card = |name: &String| {
            let gpu = name.strip_prefix("cuda:").and_then(|index| gpus.get(index.parse::<usize>().ok()?));
            gpu.map_or_else(|| name.clone(), |gpu| format!("{name} {}", gpu.name))
        };
        let driver = inventory::driver().ok().and_then(|driver| driver.version);
        let nccl = inventory::libraries().into_iter().find(|library| library.name == "NCCL");
        let none = || "none".to_owned();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cards: stages.iter().map(card).collect(),
            driver: driver.unwrap_or_else(none),
            nccl: nccl.and_then(|nccl| nccl.version.ok()).unwrap_or_else(none),
            variables: VARIABLES
                .iter()
                .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
                .collect(),
        }
    }
}

/// Reports what every rank runs on `stages`, and measures the exchange of `bytes` between the `devices` of all. Every rank calls
/// it; each gets all findings.
///
/// # Errors
/// A rank that fails, and a device that does.
pub fn examine(
    replicas: &mut Replicas,
    stages: &[String],
    devices: &[Device],
    bytes: usize,
) -> Result<Vec<Finding>> {
    let failed = |error: serde_json::Error| ReplicaError::OutOfStep { why: error.to_string() };
    let own = serde_json::to_vec(&Report::of(stages)).map_err(failed)?;
    let told = replicas.gather(&own)?;
    let reports: Vec<Report> =
        told.iter().map(|told| serde_json::from_slice(told).map_err(failed)).collect::<Result<_, _>>()?;
    let names = replicas.names().to_vec();
    let mut findings: Vec<Finding> =
        names.iter().zip(&reports).map(|(name, own)| of_rank(name, own)).collect();
    findings.extend(differences(&names, &reports));
    findings.extend(links(replicas, devices, bytes)?);
    Ok(findings)
}

fn of_rank(name: &str, report: &Report) -> Finding {
    let Report { version, cards, driver, nccl, variables } = report;
    let set: String = variables.iter().map(|(name, value)| format!(", {name}={value}")).collect();
    let found = format!("{name}: {version} on {}, driver {driver}, NCCL {nccl}{set}", cards.join(" + "));
    Finding { what: "rank", standing: Standing::Good, found, way_out: None }
}

/// What is not the same on all ranks.
fn differences(names: &[String], reports: &[Report]) -> Vec<Finding> {
    let kinds = |report: &Report| {
        let kind = |card: &String| card.split_once(' ').map_or(card.clone(), |(_, kind)| kind.to_owned());
        report.cards.iter().map(kind).collect::<Vec<_>>().join(" + ")
    };
    type Aspect<'a> = (&'static str, Standing, &'a dyn Fn(&Report) -> String, &'static str);
    let aspects: [Aspect; 4] = [
        (
            "version",
            Standing::Bad,
            &|own| own.version.clone(),
            "install the same version everywhere: replicas refuse to meet",
        ),
        (
            "cards",
            Standing::Missing,
            &kinds,
            "the slowest replica sets the pace; sums still have the same bits everywhere",
        ),
        (
            "driver",
            Standing::Missing,
            &|own| own.driver.clone(),
            "not needed for the same bits, but a usual cause of trouble",
        ),
        (
            "NCCL",
            Standing::Missing,
            &|own| own.nccl.clone(),
            "different versions of NCCL may refuse each other: install the same one",
        ),
    ];
    let differ = |(what, standing, of, way_out): Aspect| {
        let first = of(reports.first()?);
        let others = names.iter().zip(reports).filter(|(_, report)| of(report) != first);
        let others: Vec<String> = others.map(|(name, report)| format!("{name} has {}", of(report))).collect();
        let found = format!("rank 0 has {first}, {}", others.join(", "));
        (!others.is_empty()).then(|| Finding { what, standing, found, way_out: Some(way_out.to_owned()) })
    };
    aspects.into_iter().filter_map(differ).collect()
}

/// How fast the sum of `bytes` is on each of `devices` with those of the other ranks.
fn links(replicas: &mut Replicas, devices: &[Device], bytes: usize) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let others = (replicas.world() - 1) as f64 / replicas.world() as f64;
    for (index, device) in devices.iter().enumerate() {
        let numbers = Tensor::ones(bytes / 4, DType::F32, device)?;
        // The first exchange connects.
        replicas.sum(vec![numbers.clone()])?;
        device.synchronize()?;
        replicas.barrier()?;
        let begun = Instant::now();
        let sum = replicas.sum(vec![numbers])?;
        device.synchronize()?;
        let seconds = begun.elapsed().as_secs_f64();
        let got: f32 = sum[0].narrow(0, 0, 1)?.sum_all()?.to_scalar()?; // as many as were given
        let is_right = got == replicas.world() as f32;
        let found = format!(
            "stage {index}: {} MB summed over {} ranks by {} in {seconds:.3} s, {:.2} GB/s each way a rank",
            bytes / 1_000_000,
            replicas.world(),
            replicas.carrier(),
            2.0 * others * bytes as f64 / seconds / 1e9
        );
        let standing = if is_right { Standing::Good } else { Standing::Bad };
        let way_out =
            (!is_right).then(|| format!("the sum of ones is {got}: a GPU or a link computes wrongly"));
        findings.push(Finding { what: "exchange", standing, found, way_out });
    }
    Ok(findings)
}
