//! Every file in tests/scenarios, played in the simulated cluster (src/scenario.rs).

use mmm_tests::scenario::play;
use std::path::Path;

#[test]
fn every_scenario_goes_as_it_is_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("tests/scenarios")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no scenario in {}", folder.display());
    let mut failed = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).expect("a scenario");
        let first = text.lines().next().unwrap_or_default();
        assert!(first.starts_with("# "), "{} does not begin with what it is about", file.display());
        let played = play(&text);
        if let Err(what) = played.end {
            failed.push(format!("{}: {what}\n{}", file.display(), played.story.join("\n")));
        }
    }
    assert!(failed.is_empty(), "{} of {} scenarios failed\n{}", failed.len(), files.len(), failed.join("\n\n"));
}
