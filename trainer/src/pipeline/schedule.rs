//! Schedules of a pipeline as data: for each stage, which micro-batch to send which way, in order.

/// One thing that a stage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// The forward of a micro-batch.
    Forward(usize),
    /// The backward of a micro-batch.
    Backward(usize),
}

/// One forward, one backward: a stage starts as many forwards as there are stages from it to the end, then takes
/// backward and forward in turn, so that all stages work and few micro-batches are held at once
/// (Narayanan et al. 2019, PipeDream, arXiv 1806.03377). With one micro-batch it is the plain split.
///
/// Backwards run in the order of the micro-batches on every stage, so sums of gradients do not depend on the split.
pub fn one_f_one_b(stages: usize, micro_batches: usize) -> Vec<Vec<Op>> {
    let of_stage = |stage: usize| {
        let ahead = (stages - stage).min(micro_batches);
        let mut ops: Vec<Op> = (0..ahead).map(Op::Forward).collect();
        for done in 0..micro_batches {
            ops.push(Op::Backward(done));
            if done + ahead < micro_batches {
                ops.push(Op::Forward(done + ahead));
            }
        }
        ops
    };
    (0..stages).map(of_stage).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays the schedule in lock step and returns (time, share of busy slots), failing where it dead-locks.
    fn play(schedule: &[Vec<Op>]) -> (usize, f64) {
        let stages = schedule.len();
        let mut next = vec![0; stages];
        let mut done: Vec<Vec<Op>> = vec![Vec::new(); stages];
        let (mut time, mut busy) = (0, 0);
        while next.iter().zip(schedule).any(|(n, ops)| *n < ops.len()) {
            let before = done.clone();
            for stage in 0..stages {
                let Some(op) = schedule[stage].get(next[stage]) else { continue };
                let ready = match op {
                    Op::Forward(_) => stage == 0 || before[stage - 1].contains(op),
                    Op::Backward(m) if stage + 1 == stages => before[stage].contains(&Op::Forward(*m)),
                    Op::Backward(_) => before[stage + 1].contains(op),
                };
                if ready {
                    done[stage].push(*op);
                    next[stage] += 1;
                    busy += 1;
                }
            }
            time += 1;
            assert!(time < 10_000, "the schedule is stuck");
        }
        (time, busy as f64 / (time * stages) as f64)
    }

    #[test]
    fn schedules_end_and_hold_few_micro_batches() {
        for stages in 1..5 {
            for micro_batches in 1..9 {
                let schedule = one_f_one_b(stages, micro_batches);
                play(&schedule);
                for (stage, ops) in schedule.iter().enumerate() {
                    assert_eq!(ops.len(), 2 * micro_batches);
                    let (mut held, mut most) = (0_usize, 0);
                    for op in ops {
                        held = if matches!(op, Op::Forward(_)) { held + 1 } else { held - 1 };
                        most = most.max(held);
                    }
                    assert!(most <= stages - stage, "stage {stage} of {stages} holds {most} micro-batches");
                }
            }
        }
    }

    #[test]
    fn two_stages_are_busy_with_eight_micro_batches() {
        let (_, share) = play(&one_f_one_b(2, 8));
        assert!(share > 0.88, "busy for {share:.2} of the time"); // 16 slots of 18
    }
}
