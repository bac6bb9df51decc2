//! The model checker as CI runs it. Safeguards are taken away for a whole process, so each run is one.

use std::process::Command;

fn succeeds(arguments: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_mmm-model")).args(arguments).output().expect("the checker starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "mmm-model {}:\n{out}{err}", arguments.join(" "));
}

#[test]
fn with_every_rule_there_are_never_two_holders_and_nothing_is_left_out_and_without_any_rule_there_are() {
    succeeds(&["all", "--seconds", "900"]);
}

#[test]
fn what_is_cut_short_is_no_success() {
    let mut checker = Command::new(env!("CARGO_BIN_EXE_mmm-model"));
    let output = checker.args(["check", "everything", "--seconds", "1"]).output().expect("the checker starts");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("cut short after 1 s and proves nothing"));
}
