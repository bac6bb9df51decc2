//! `mmm_control doctor` on a whole cluster: nothing is wrong with a healthy one, and what is broken at once is all named,
//! with an exit code for scripts.

use anyhow::{Context as _, Result, ensure};
use mmm_common::control::Answer;
use mmm_common::examine::{Finding, Severity, Subject};
use mmm_tests::lab::network::DB;
use mmm_tests::lab::{Lab, LabConfig};
use std::time::{Duration, Instant};

/// The findings, and whether the exit code was 0.
fn doctor(lab: &Lab) -> Result<(Vec<Finding>, bool)> {
    let began = Instant::now();
    let output = lab.control(&["doctor", "--json"])?;
    let answer: Answer = serde_json::from_str(&output.text).with_context(|| output.text.clone())?;
    println!("after {:.1} s:\n{}", began.elapsed().as_secs_f64(), answer.text(&|_| String::new()));
    let Answer::Doctor { findings } = answer else { anyhow::bail!("{answer:?}") };
    ensure!(began.elapsed() < Duration::from_secs(20), "it took {:?}", began.elapsed());
    Ok((findings, output.ok()))
}

fn has(findings: &[Finding], host: &str, subject: Subject, severity: Severity) -> bool {
    let of = |f: &&Finding| f.host.as_ref().is_some_and(|h| h.as_str() == host) && f.subject == subject;
    findings.iter().filter(of).any(|f| f.severity == severity)
}

#[test]
fn a_healthy_cluster_has_no_errors_and_broken_things_are_all_named() -> Result<()> {
    Lab::run(LabConfig::default(), |lab| {
        let writer = lab.bring_online()?;
        let (findings, good) = doctor(lab)?;
        let errors: Vec<&Finding> = findings.iter().filter(|f| f.severity == Severity::Error).collect();
        ensure!(errors.is_empty() && good, "a healthy cluster: {errors:#?}");
        for host in DB {
            for subject in [Subject::Server, Subject::Arp, Subject::AgentPort, Subject::Clock, Subject::ReplicationUser]
            {
                ensure!(has(&findings, host, subject, Severity::Ok), "{subject} of {host}: {findings:#?}");
            }
            let arp = |f: &&Finding| f.subject == Subject::Arp && f.host.as_ref().is_some_and(|h| h.as_str() == host);
            let heard = findings.iter().filter(arp).any(|f| f.found == "all were heard");
            ensure!(heard, "{host} hears the others on the wire: {findings:#?}");
        }
        ensure!(
            findings.iter().any(|f| f.subject == Subject::ErrantTransactions),
            "positions were compared with the writer's: {findings:#?}"
        );
        ensure!(lab.writer()? == writer, "nothing has moved");

        lab.mysql("db2", "SET GLOBAL auto_increment_offset=1")?;
        lab.mysql(writer, "ALTER USER 'replication'@'%' IDENTIFIED BY 'another'")?;
        lab.kill_agent("db3")?;
        // The change of the account is replicated.
        let mut findings = Vec::new();
        lab.wait_for("all three to be named", Duration::from_secs(30), || {
            let (found, good) = doctor(lab)?;
            findings = found;
            ensure!(!good, "errors, and yet it exited with 0");
            ensure!(has(&findings, "db3", Subject::Agent, Severity::Error), "the dead agent: {findings:#?}");
            ensure!(has(&findings, "db1", Subject::AgentPort, Severity::Error), "as its peer sees it: {findings:#?}");
            for host in ["db1", "db2"] {
                ensure!(has(&findings, host, Subject::ReplicationUser, Severity::Error), "{host}: {findings:#?}");
                ensure!(has(&findings, host, Subject::AutoIncrement, Severity::Warning), "{host}: {findings:#?}");
            }
            Ok(())
        })?;
        let text = lab.control(&["doctor"])?;
        ensure!(text.code == 1, "exit code {}", text.code);
        ensure!(text.text.starts_with("ERROR "), "the worst first:\n{}", text.text);
        ensure!(text.text.contains("cure:  start mmm_agentd on db3"), "{}", text.text);
        ensure!(!text.text.contains("another") && !text.text.contains("RepAgent"), "no password: {}", text.text);
        Ok(())
    })
}
