//! Replicas: they find each other or all say why not, their sums have one order, and none goes on without the others.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kernels::{Device, Tensor};
use proofs::{assert_same_bits, randn};
use trainer::replicas::nccl::{Mover, sum_on_device};
use trainer::replicas::{Introduction, Job, Meeting, Member, ReplicaError, Replicas, Timing};

type Outcome<T> = Result<T, ReplicaError>;

/// A rank that keeps others waiting is noticed within a second. A thread that gets no processor for a while, on a machine
/// that runs other proofs too, is not taken for a silent rank.
const TIMING: Timing = Timing {
    join: Duration::from_secs(60),
    beat: Duration::from_millis(50),
    silence: Duration::from_secs(30),
    grace: Duration::from_secs(60),
    exchange: Duration::from_secs(1),
};

/// A port with free ones behind it, most likely.
fn port() -> u16 {
    TcpListener::bind(("localhost", 0)).unwrap().local_addr().unwrap().port()
}

fn at_port(port: u16) -> Meeting {
    Meeting::Port("localhost".to_owned(), port)
}

fn member(rank: usize, world: usize, meeting: &Meeting) -> Member {
    let job = Job { meeting: meeting.clone(), id: "proof".to_owned(), restarts: 0, launcher: "a proof" };
    Member { rank, world, local_rank: rank, local_world: world, job }
}

fn introduction(steps: usize) -> Introduction {
    let settings = [("train.steps", steps.to_string()), ("model.name", "tiny".to_owned())];
    let settings = settings.map(|(key, value)| (key.to_owned(), value)).into();
    Introduction { version: "1".to_owned(), settings, devices: Vec::new() }
}

fn join(member: &Member, introduction: Introduction) -> Outcome<Replicas> {
    Replicas::join(member, introduction, TIMING, Arc::new(|_| {}))
}

/// Runs `work` on every rank of a group of `world`, each in a thread of its own.
fn group<T: Send>(world: usize, work: impl Fn(Replicas) -> T + Sync) -> Vec<T> {
    let meeting = at_port(port());
    each(world, |rank| work(join(&member(rank, world, &meeting), introduction(7)).unwrap()))
}

fn each<T: Send>(world: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..world)
            .map(|rank| {
                scope.spawn({
                    let work = &work;
                    move || work(rank)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Sums of any other order would differ in bits for numbers of such different sizes.
#[test]
fn sums_have_the_order_of_the_ranks_on_every_rank() {
    for world in 2..=5 {
        let own = |rank: usize| -> Vec<Tensor> {
            // More numbers than go into one bucket, an empty tensor, and one of a single number.
            let shapes: [&[usize]; 4] = [&[3, 5], &[0], &[1], &[(4 << 20) + 3]];
            let scale = 10_f64.powi(3 * (rank as i32 % 3));
            let of = |(i, shape): (usize, &&[usize])| {
                (randn(&format!("sums.{rank}.{i}"), *shape) * scale).unwrap()
            };
            shapes.iter().enumerate().map(of).collect()
        };
        let mut expected = own(0);
        for rank in 1..world {
            let more = expected.iter().zip(own(rank)).map(|(sum, own)| (sum + own).unwrap());
            expected = more.collect();
        }
        let sums = group(world, |mut replicas| {
            let sums = replicas.sum(own(replicas.rank())).unwrap();
            let told = replicas.gather(format!("rank {}", replicas.rank()).as_bytes()).unwrap();
            let said = replicas.broadcast(vec![replicas.rank() as u8 + 1; 100_000]).unwrap();
            let any = [replicas.any(replicas.rank() == 1).unwrap(), replicas.any(false).unwrap()];
            replicas.leave().unwrap();
            (sums, told, said, any)
        });
        for (rank, (sums, told, said, any)) in sums.into_iter().enumerate() {
            for (i, (sum, expected)) in sums.iter().zip(&expected).enumerate() {
                assert_same_bits(&format!("tensor {i} on rank {rank} of {world}"), sum, expected);
            }
            let all: Vec<String> = told.into_iter().map(|text| String::from_utf8(text).unwrap()).collect();
            assert_eq!(all, (0..world).map(|rank| format!("rank {rank}")).collect::<Vec<_>>());
            assert!(said.len() == 100_000 && said.iter().all(|byte| *byte == 1), "what rank 0 has said");
            assert_eq!(any, [true, false]);
        }
    }
}

/// What NCCL does for a rank, by channels between threads.
struct Channels {
    rank: usize,
    to: Vec<Sender<(usize, Tensor)>>,
    from: Receiver<(usize, Tensor)>,
    barrier: Arc<Barrier>,
}

impl Channels {
    fn group(world: usize) -> Vec<Self> {
        let (to, from): (Vec<_>, Vec<_>) = (0..world).map(|_| channel()).unzip();
        let barrier = Arc::new(Barrier::new(world));
        let own = |(rank, from)| Self { rank, to: to.clone(), from, barrier: barrier.clone() };
        from.into_iter().enumerate().map(own).collect()
    }

    /// What all ranks send to this one, which sends each of `parts` to its rank.
    fn exchanged(&self, parts: Vec<Tensor>) -> kernels::Result<Tensor> {
        for (to, part) in self.to.iter().zip(parts) {
            to.send((self.rank, part)).unwrap();
        }
        let mut got: Vec<_> = self.to.iter().map(|_| self.from.recv().unwrap()).collect();
        got.sort_by_key(|(rank, _)| *rank);
        // Nothing of the next exchange comes before all have this one.
        self.barrier.wait();
        Tensor::stack(&got.into_iter().map(|(_, part)| part).collect::<Vec<_>>(), 0)
    }
}

impl Mover for Channels {
    fn all_to_all(&self, x: &Tensor) -> kernels::Result<Tensor> {
        self.exchanged((0..self.to.len()).map(|rank| x.get(rank)).collect::<kernels::Result<_>>()?)
    }

    fn all_gather(&self, x: &Tensor) -> kernels::Result<Tensor> {
        self.exchanged(vec![x.clone(); self.to.len()])
    }
}

/// The sums over NCCL, with other movers: numbers that no number of ranks divides, in more than one bucket.
#[test]
fn sums_in_parts_have_the_bits_of_sums_over_tcp() {
    for world in [2, 3, 5] {
        let own = |rank: usize| -> Vec<Tensor> {
            let of = |(i, count)| {
                randn(&format!("parts.{rank}.{i}"), count).affine(10_f64.powi(3 * rank as i32), 0.0)
            };
            [7, 1, (4 << 20) - 5, 13].into_iter().enumerate().map(|one| of(one).unwrap()).collect()
        };
        let over_tcp = group(world, |mut replicas| {
            let sums = replicas.sum(own(replicas.rank())).unwrap();
            replicas.leave().unwrap();
            sums
        });
        let channels: Vec<Mutex<Option<Channels>>> =
            Channels::group(world).into_iter().map(|channels| Mutex::new(Some(channels))).collect();
        let in_parts = each(world, |rank| {
            let channels = channels[rank].lock().unwrap().take().unwrap();
            sum_on_device(own(rank), world, &channels).unwrap()
        });
        for (rank, (sums, expected)) in in_parts.iter().zip(&over_tcp).enumerate() {
            for (i, (sum, expected)) in sums.iter().zip(expected).enumerate() {
                assert_same_bits(&format!("tensor {i} on rank {rank} of {world}"), sum, expected);
            }
        }
    }
}

fn sentences<T>(outcomes: Vec<Outcome<T>>) -> Vec<String> {
    let sentence = |outcome: Outcome<T>| match outcome {
        Err(error @ ReplicaError::Mismatch { .. }) => error.to_string(),
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("a rank was welcomed"),
    };
    outcomes.into_iter().map(sentence).collect()
}

/// A wrong recipe on one host is the commonest fault of all, so every rank's output explains it.
#[test]
fn ranks_that_do_not_match_all_stop_with_the_same_sentence() {
    // Rank, world and introduction of the n-th process.
    type Of = fn(usize) -> (usize, usize, Introduction);
    let cases: [(&str, Of); 5] = [
        ("train.steps = 8 in place of 7", |rank| (rank, 3, introduction(7 + usize::from(rank == 2)))),
        ("runs version 2", |rank| {
            (rank, 3, Introduction { version: (1 + rank / 2).to_string(), ..introduction(7) })
        }),
        ("expects 4 ranks", |rank| (rank, 3 + usize::from(rank == 2), introduction(7))),
        ("have the same rank", |rank| (rank.min(1), 3, introduction(7))),
        ("use the same GPU", |rank| {
            (rank, 3, Introduction { devices: vec![format!("gpu {}", rank / 2)], ..introduction(7) })
        }),
    ];
    for (words, of) in cases {
        let meeting = at_port(port());
        let outcomes = each(3, |rank| {
            let (rank, world, introduction) = of(rank);
            join(&member(rank, world, &meeting), introduction)
        });
        let told = sentences(outcomes);
        assert!(told[0].contains(words), "{words}: {}", told[0]);
        assert!(told.iter().all(|sentence| *sentence == told[0]), "{told:#?}");
    }
}

#[test]
fn slow_ranks_are_waited_for_and_late_ones_are_sent_away() {
    let meeting = at_port(port());
    let (all_met, all_tried) = (Barrier::new(5), Barrier::new(5));
    let outcomes = each(5, |n| {
        // Rank 0 comes after rank 1; a fourth and a fifth process think that they belong to the three.
        let (rank, wait) = [(0, 400), (1, 0), (2, 900), (2, 0), (1, 0)][n];
        if n > 2 {
            all_met.wait();
            let outcome = join(&member(rank, 3, &meeting), introduction(7)).map(drop);
            all_tried.wait();
            return outcome;
        }
        thread::sleep(Duration::from_millis(wait));
        let met = join(&member(rank, 3, &meeting), introduction(7)).and_then(|mut replicas| {
            replicas.barrier()?;
            Ok(replicas)
        });
        all_met.wait();
        all_tried.wait();
        met?.leave()
    });
    assert!(outcomes[..3].iter().all(Result::is_ok), "{outcomes:?}");
    for late in &outcomes[3..] {
        let sentence = late.as_ref().unwrap_err().to_string();
        assert!(sentence.contains("all 3 ranks of proof are there already"), "{sentence}");
    }
}

/// Launchers reuse ports: ranks of a job that meet another one, or the start of theirs before a restart, go on looking.
#[test]
fn two_jobs_at_one_port_do_not_mix() {
    let meeting = at_port(port());
    let outcomes = each(6, |n| {
        let (rank, restarts) = (n % 2, (n / 2) as u32);
        let mut own = member(rank, 2, &meeting);
        own.job.restarts = restarts;
        let mut replicas = join(&own, introduction(n / 2))?;
        let told = replicas.gather(&[n as u8])?;
        replicas.leave().map(|()| told)
    });
    for (n, told) in outcomes.into_iter().enumerate() {
        let first = (n / 2 * 2) as u8;
        assert_eq!(told.unwrap(), [[first], [first + 1]]);
    }
}

#[test]
fn ranks_meet_by_a_file_where_no_port_is_agreed() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("meet.json");
    // What an earlier job left.
    std::fs::write(&path, r#"{"job":"other","restarts":0,"host":"nowhere","port":1}"#).unwrap();
    let meeting = Meeting::File(path);
    let told = each(3, |rank| {
        let mut replicas = join(&member(rank, 3, &meeting), introduction(7)).unwrap();
        let told = replicas.gather(&[rank as u8]).unwrap();
        replicas.leave().unwrap();
        told
    });
    assert!(told.iter().all(|told| *told == [[0], [1], [2]]), "{told:?}");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let meeting = at_port(port());
    let timing = Timing { join: Duration::from_millis(500), ..TIMING };
    let outcomes = each(2, |n| {
        let member = member([0, 2][n], 4, &meeting);
        Replicas::join(&member, introduction(7), timing, Arc::new(|_| {})).map(drop)
    });
    let told = outcomes[0].as_ref().unwrap_err().to_string();
    assert!(told.contains("2 of 4 replicas did not come") && told.contains("rank 1, rank 3"), "{told}");
    assert!(outcomes[1].is_err());
}

/// What the others say when rank `bad` of four does `what`, and how long it took them.
fn others(bad: usize, what: impl Fn(Replicas) + Sync) -> Vec<(String, Duration)> {
    let told = group(4, |mut replicas| {
        replicas.barrier().unwrap();
        if replicas.rank() == bad {
            what(replicas);
            return None;
        }
        let begun = Instant::now();
        let numbers = Tensor::ones(64, kernels::DType::F32, &Device::Cpu).unwrap();
        let work = |replicas: &mut Replicas| loop {
            if let Err(error) = replicas.sum(vec![numbers.clone()]) {
                return error;
            }
        };
        let error = replicas.in_step(work);
        assert_eq!(trainer::cli::exit_code(&anyhow::Error::from(error)), 75);
        let told = replicas.check().unwrap_err().to_string();
        Some((told, begun.elapsed()))
    });
    told.into_iter().flatten().collect()
}

#[test]
fn when_one_rank_fails_all_others_stop_and_say_which() {
    let hang = |replicas: Replicas| {
        let mut replicas = replicas;
        replicas.in_step(|_| thread::sleep(Duration::from_secs(3)));
    };
    let cases: [(&str, &(dyn Fn(Replicas) + Sync)); 3] = [
        ("has stopped: the disk is full", &|replicas| replicas.abort("the disk is full", 75)),
        ("has stopped: it ended early", &drop),
        ("kept the others waiting for 1 s", &hang),
    ];
    for (words, what) in cases {
        for bad in [0, 3] {
            let told = others(bad, what);
            assert_eq!(told.len(), 3);
            for (sentence, took) in &told {
                let name = format!("rank {bad} ");
                assert!(sentence.contains(words) && sentence.contains(&name), "{words}: {sentence}");
                assert!(*took < TIMING.silence, "{words}: {took:?}");
            }
            assert!(told.iter().all(|(sentence, _)| *sentence == told[0].0), "{told:?}");
        }
    }
}

/// Rank 0 makes clips for minutes while the others wait for its next step: that is no fault.
#[test]
fn waiting_for_a_rank_that_does_something_else_has_no_limit() {
    let told = group(3, |mut replicas| {
        if replicas.rank() == 0 {
            thread::sleep(Duration::from_millis(2500));
        }
        let told = replicas.in_step(|replicas| replicas.gather(&[1]));
        replicas.leave().unwrap();
        told
    });
    assert!(told.iter().all(Result::is_ok), "{told:?}");
}

mod launchers {
    use super::*;
    use trainer::replicas::launcher::{Launched, found};
    use trainer::replicas::node_list::expand;

    fn with(variables: &str) -> Outcome<Launched> {
        let pairs = variables.split_whitespace().map(|pair| pair.split_once('=').unwrap());
        let all: BTreeMap<String, String> =
            pairs.map(|(name, value)| (name.to_owned(), value.replace('+', "\n"))).collect();
        found(&|name| all.get(name).cloned())
    }

    #[track_caller]
    fn is_member(variables: &str, numbers: [usize; 4], place: &str, launcher: &str) {
        let Launched::Replica(member) = with(variables).unwrap() else { panic!("{variables}: no replica") };
        let Member { rank, world, local_rank, local_world, job } = member;
        assert_eq!([rank, world, local_rank, local_world], numbers, "{variables}");
        assert_eq!((job.meeting.to_string().as_str(), job.launcher), (place, launcher));
    }

    #[track_caller]
    fn is_host(variables: &str, numbers: [usize; 2], place: &str, launcher: &str) {
        let Launched::Host(node) = with(variables).unwrap() else { panic!("{variables}: no host") };
        assert_eq!([node.rank, node.count], numbers, "{variables}");
        assert_eq!((node.job.meeting.to_string().as_str(), node.job.launcher), (place, launcher));
    }

    const TORCHRUN: &str = "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 GROUP_RANK=1 MASTER_ADDR=head \
                            MASTER_PORT=29500 TORCHELASTIC_RUN_ID=abc TORCHELASTIC_RESTART_COUNT=2";
    const SLURM: &str = "SLURM_STEP_ID=0 SLURM_PROCID=6 SLURM_LOCALID=0 SLURM_NODEID=3 SLURM_STEP_NUM_TASKS=7 \
                         SLURM_NTASKS=7 SLURM_JOB_ID=5001 SLURM_STEP_NODELIST=gpu[08-10],big7 \
                         SLURM_STEP_TASKS_PER_NODE=2(x3),1 SLURM_RESTART_COUNT=1";

    #[test]
    fn every_launcher_is_understood() {
        is_member(TORCHRUN, [5, 8, 1, 4], "head:29500", "torchrun");
        // 29400 + 5001 % 1024.
        is_member(SLURM, [6, 7, 0, 1], "gpu08:30305", "Slurm");
        is_member(&format!("{SLURM} MASTER_ADDR=ib0 MASTER_PORT=1234"), [6, 7, 0, 1], "ib0:1234", "Slurm");
        // torchrun below srun: the inner launcher counts.
        is_member(&format!("{SLURM} {TORCHRUN}"), [5, 8, 1, 4], "head:29500", "torchrun");
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 \
                   OMPI_COMM_WORLD_LOCAL_SIZE=2 MASTER_ADDR=a MASTER_PORT=5";
        is_member(mpi, [1, 4, 1, 2], "a:5", "Open MPI");
        let mpich = "PMI_RANK=2 PMI_SIZE=4 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2 MASTER_ADDR=a MASTER_PORT=5";
        is_member(mpich, [2, 4, 0, 2], "a:5", "MPICH");
        is_host("RANK=1 WORLD_SIZE=3 MASTER_ADDR=m MASTER_PORT=23456", [1, 3], "m:23456", "PyTorchJob");
        let trainer =
            "PET_NNODES=2 PET_NPROC_PER_NODE=4 PET_NODE_RANK=1 PET_MASTER_ADDR=t PET_MASTER_PORT=29400";
        is_host(trainer, [1, 2], "t:29400", "Kubeflow Trainer");
        let indexed = "JOB_COMPLETION_INDEX=2 NNODES=3 MASTER_ADDR=run-0.run";
        is_host(indexed, [2, 3], "run-0.run:29400", "Indexed Job");
        let sky = "SKYPILOT_NODE_RANK=1 SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_IPS=10.0.0.4+10.0.0.5";
        is_host(sky, [1, 2], "10.0.0.4:29400", "SkyPilot");
    }

    #[test]
    fn a_process_without_others_is_alone() {
        let batch_script = "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=a[1-4]";
        let one_task = "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1";
        for alone in ["", batch_script, one_task, "JOB_COMPLETION_INDEX=0", "OMPI_COMM_WORLD_RANK=0"] {
            assert_eq!(with(alone).unwrap(), Launched::Alone, "{alone}");
        }
    }

    #[test]
    fn what_a_launcher_leaves_out_is_named() {
        for (variables, words) in [
            ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2", "MASTER_ADDR is not set"),
            ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "LOCAL_WORLD_SIZE is not set"),
            ("RANK=x LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a", "RANK is \"x\""),
            ("RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a", "rank 2 of 2"),
            (
                "RANK=2 LOCAL_RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=99999",
                "no port",
            ),
            (
                "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2",
                "-x MASTER_ADDR",
            ),
            ("PMIX_RANK=1", "start with torchrun"),
            ("JOB_COMPLETION_INDEX=1", "NNODES is not set"),
            ("JOB_COMPLETION_INDEX=1 NNODES=2", "MASTER_ADDR is not set"),
            ("RANK=3 WORLD_SIZE=3 MASTER_ADDR=m", "host 3 of 3"),
        ] {
            let error = with(variables).unwrap_err().to_string();
            assert!(error.contains(words), "{variables}: {error}");
        }
    }

    #[test]
    fn node_lists_are_expanded_as_slurm_does() {
        let long: Vec<String> = (1..=120).map(|n| format!("node{n:03}-ib")).collect();
        for (list, hosts) in [
            ("login", vec!["login"]),
            ("a[1-3,7],b", vec!["a1", "a2", "a3", "a7", "b"]),
            ("gpu[08-10]", vec!["gpu08", "gpu09", "gpu10"]),
            (
                "r[1-2]n[3,5].cluster, x",
                vec!["r1n3.cluster", "r1n5.cluster", "r2n3.cluster", "r2n5.cluster", "x"],
            ),
            ("node[001-120]-ib", long.iter().map(String::as_str).collect()),
        ] {
            assert_eq!(expand(list).unwrap(), hosts, "{list}");
        }
        for broken in
            ["", "a[1-2", "a]", "a[[1]]", "a[3-1]", "a[x]", "a[1-]", "a[1-9999999]", "a[99999999999]"]
        {
            assert!(expand(broken).is_err(), "{broken}");
        }
    }
}
