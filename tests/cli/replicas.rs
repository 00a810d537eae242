//! Commands about replicas, without a run of several hosts.

use serde_json::Value;

use crate::desk::Desk;

#[test]
fn doctor_reports_every_replica_and_measures_the_exchange() {
    let desk = Desk::new();
    let told = desk.succeed(&["launch", "--replicas", "3", "--doctor", "--megabytes", "4"]);
    for words in ["rank 0 (host", "rank 1 (host", "rank 2 (host", "4 MB summed over 3 ranks by TCP"] {
        assert!(told.stdout.contains(words), "no {words} in {}", told.stdout);
    }
    // Rank 0 alone prints.
    assert!(told.stdout.lines().all(|line| line.starts_with("[rank 0]")), "{}", told.stdout);
    desk.refuse(&["doctor", "--cluster"], &["there is no launcher", "tandem launch --doctor"]);
}

/// Every replica has a micro-batch of each step, or it would only wait.
#[test]
fn a_plan_refuses_replicas_without_work() {
    let desk = Desk::new();
    let plan = ["plan", "recipe.toml", "--set", "devices.replicas=3", "--set", "train.accumulate=2"];
    desk.refuse(&plan, &["train.accumulate", "at least 3"]);
    desk.refuse(
        &["plan", "recipe.toml", "--set", "devices.replicas=many"],
        &["\"many\" is no number of replicas"],
    );
    desk.refuse(&["plan", "recipe.toml", "--set", "devices.replicas=0"], &["devices.replicas", "at least 1"]);
    let plan =
        desk.succeed(&["plan", "recipe.toml", "--set", "devices.replicas=2", "--set", "train.accumulate=3"]);
    assert!(plan.stdout.contains("replicas = 2"), "{}", plan.stdout);
}

/// The ways that replicas are started in differ in nothing that a run computes.
#[test]
fn replicas_by_launch_and_by_the_variables_of_torchrun_have_the_same_bits() {
    let desk = Desk::new();
    let bench = [
        "bench",
        "replicas",
        "--replicas",
        "2",
        "--width",
        "96",
        "--height",
        "96",
        "--frames",
        "5",
        "--steps",
        "3",
        "--accumulate",
        "1",
        "--rank",
        "2",
        "--gbits",
        "0.1",
        "--scratch",
        ".",
    ];
    let told = desk.succeed(&bench).stdout;
    let row: Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    let two = &row["worlds"][0];
    assert_eq!((&two["replicas"], &two["same_bits"]), (&Value::from(2), &Value::from(true)), "{row}");
    for way in ["launch", "torchrun", "slowed"] {
        assert!(
            two[way]["efficiency"].as_f64().unwrap() > 0.0 && two[way]["exchange_s"].is_number(),
            "{way}: {row}"
        );
    }
    desk.assert_no_temporary_files();
}
