//! The solvers give the same grids and results as Wan's published ones.

use kernels::{DType, Tensor};
use proofs::{Tolerance, assert_close, fixture_tensors};
use trainer::solver::{Convention, Schedule, Solver, SolverKind};

/// Sigmas are stored in float32: one rounding.
const SIGMA: Tolerance = Tolerance::absolute(1e-6);
/// A trajectory adds some twenty float32 roundings of values up to 4.
const TRAJECTORY: Tolerance = Tolerance::absolute(1e-5);

const RUNS: [(&str, SolverKind, Convention); 5] = [
    ("unipc_official", SolverKind::UniPc, Convention::Official),
    ("unipc_diffusers", SolverKind::UniPc, Convention::Diffusers),
    ("euler", SolverKind::Euler, Convention::Official),
    ("euler_diffusers_default", SolverKind::Euler, Convention::Diffusers),
    ("dpmpp2m", SolverKind::DpmPp2m, Convention::Diffusers),
];

/// The made-up network of the fixtures: v = 0.5 x + (0.2 + sigma) sin(2x) - c.
fn velocity(x: &Tensor, sigma: f32, c: &Tensor) -> Tensor {
    let wave = (x * 2.0).unwrap().sin().unwrap().affine(0.2 + f64::from(sigma), 0.0).unwrap();
    ((x * 0.5).unwrap() + wave).unwrap().sub(c).unwrap()
}

fn f32s(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// x at every sigma, [steps + 1, ...].
fn integrate(schedule: &Schedule, start: &Tensor, c: &Tensor) -> Tensor {
    let mut solver = Solver::new(schedule.clone());
    let mut trajectory = vec![start.clone()];
    for i in 0..schedule.steps() {
        let x = &trajectory[i];
        let next = solver.step(x, &velocity(x, schedule.sigmas[i], c), i).unwrap();
        trajectory.push(next);
    }
    Tensor::stack(&trajectory, 0).unwrap()
}

#[test]
fn trajectories_equal_golden_ones() {
    for shift in [3, 5, 8] {
        for steps in [10, 20] {
            let golden = fixture_tensors(&format!("schedulers/shift{shift}_n{steps}.safetensors"));
            for (name, kind, convention) in RUNS {
                let what = format!("{name}, shift {shift}, {steps} steps");
                let schedule = Schedule::new(kind, convention, steps, f64::from(shift)).unwrap();
                let sigmas = Tensor::new(schedule.sigmas.as_slice(), golden["c"].device()).unwrap();
                assert_close(&what, &sigmas, &golden[&format!("{name}.sigmas")], SIGMA);
                assert_eq!(
                    schedule.timesteps,
                    f32s(&golden[&format!("{name}.timesteps")]),
                    "{what}: timesteps"
                );
                let x = integrate(&schedule, &golden["x_init"], &golden["c"]);
                assert_close(&what, &x, &golden[&format!("{name}.x")], TRAJECTORY);
            }
        }
    }
}

#[test]
fn grids_of_real_runs_equal_golden_tables() {
    let golden = fixture_tensors("schedulers/tables.safetensors");
    for (name, convention) in [("official", Convention::Official), ("diffusers", Convention::Diffusers)] {
        for shift in [3, 5, 8, 12] {
            for steps in [20, 40, 50] {
                let key = format!("{name}.shift{shift}.n{steps}");
                let schedule = Schedule::new(SolverKind::UniPc, convention, steps, f64::from(shift)).unwrap();
                let sigmas =
                    Tensor::new(schedule.sigmas.as_slice(), golden.values().next().unwrap().device())
                        .unwrap();
                assert_close(&key, &sigmas, &golden[&format!("{key}.sigmas")], SIGMA);
                assert_eq!(
                    schedule.timesteps,
                    f32s(&golden[&format!("{key}.timesteps")]),
                    "{key}: timesteps"
                );
            }
        }
    }
}

/// With a constant velocity every solver must land on x - v exactly where the flow does, however few the steps, also
/// from sigma 1 (the official DPM++ grid), where lambda is infinite.
#[test]
fn straight_flows_are_solved_exactly_for_any_number_of_steps() {
    let (x, v) = (proofs::randn("x", (2, 3, 4)), proofs::randn("v", (2, 3, 4)));
    for kind in [SolverKind::UniPc, SolverKind::Euler, SolverKind::DpmPp2m] {
        for steps in [1, 2, 3, 7] {
            let schedule = Schedule::new(kind, Convention::Official, steps, 5.0).unwrap();
            let mut solver = Solver::new(schedule.clone());
            let mut at = x.clone();
            for i in 0..steps {
                at = solver.step(&at, &v, i).unwrap();
            }
            let end = (&x - v.affine(f64::from(schedule.sigmas[0]), 0.0).unwrap()).unwrap();
            assert_close(&format!("{kind:?}, {steps} steps"), &at, &end, TRAJECTORY);
        }
    }
}

#[test]
fn steps_out_of_order_and_impossible_grids_are_refused() {
    let x = proofs::randn("x", (1, 4));
    let mut solver = Solver::new(Schedule::new(SolverKind::UniPc, Convention::Official, 4, 5.0).unwrap());
    assert!(solver.step(&x, &x, 1).unwrap_err().to_string().contains("step 0 of 4 is next"));
    assert!(Schedule::new(SolverKind::Euler, Convention::Official, 0, 5.0).is_err());
    assert!(Schedule::new(SolverKind::Euler, Convention::Official, 4, f64::NAN).is_err());
}
