//! Tells stories by chance in the simulated cluster (src/chaos.rs), as many as there is time for, or one of them again in
//! words. It uses no network, no disk and no server; the real clock only numbers the first seed and measures.
//!
//! Exits 1 when a story breaks a rule, and prints the command that tells it again.

use clap::{Parser, Subcommand};
use mmm_tests::chaos::{Kind, Told, tell};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// So many broken stories are enough to look at.
const ENOUGH: usize = 20;
/// After so many stories a line says how far it is.
const PROGRESS: u64 = 10_000;

#[derive(Parser)]
#[command(
    name = "mmm-sim",
    about = "Random faults in a simulated cluster of real cores; the same seed, the same story"
)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Tell many stories and look at the rules after every event
    Run {
        /// How many
        #[arg(long, default_value_t = 4_000)]
        seeds: u64,
        /// The first seed; by default a new one, from the clock
        #[arg(long)]
        first: Option<u64>,
        /// planned, single, partition or storm; by default they take turns
        #[arg(long, value_parser = kind)]
        kind: Option<Kind>,
        /// End after so many minutes, also when not all are told
        #[arg(long)]
        minutes: Option<u64>,
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// A folder for the stories that break a rule
        #[arg(long)]
        stories: Option<PathBuf>,
    },
    /// Tell one story in words
    Tell {
        #[arg(long, value_parser = kind)]
        kind: Kind,
        #[arg(long)]
        seed: u64,
    },
    /// Play a scenario file (tests/scenarios) and tell it in words
    Play { file: PathBuf },
}

fn kind(name: &str) -> Result<Kind, String> {
    Kind::by_name(name).ok_or_else(|| format!("one of {:?}", Kind::ALL))
}

fn main() -> ExitCode {
    // A broken rule is told with its story, not where the program noticed it.
    std::panic::set_hook(Box::new(|_| {}));
    let whole = match Arguments::parse().what {
        What::Run { seeds, first, kind, minutes, threads, stories } => {
            run(first.unwrap_or_else(by_clock), seeds, kind, minutes, threads, stories.as_deref())
        }
        What::Tell { kind, seed } => {
            let told = tell(seed, kind);
            if let Some(what) = &told.broken {
                println!("{what}\n");
            }
            println!("{}", told.story.join("\n"));
            told.broken.is_none()
        }
        What::Play { file } => play(&file),
    };
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn by_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() * 10_000)
}

fn run(
    first: u64,
    seeds: u64,
    kind: Option<Kind>,
    minutes: Option<u64>,
    threads: usize,
    stories: Option<&Path>,
) -> bool {
    println!("first seed {first}, {seeds} stories, {threads} threads");
    let begin = Instant::now();
    let end = minutes.map(|m| begin + Duration::from_secs(m * 60));
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let broken: Mutex<Vec<Told>> = Mutex::new(Vec::new());
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let found = broken.lock().map_or(ENOUGH, |b| b.len());
            if number >= seeds || found >= ENOUGH || end.is_some_and(|end| Instant::now() >= end) {
                return;
            }
            let seed = first + number;
            let kind = kind.unwrap_or(Kind::ALL[(seed / 2 % 4) as usize]);
            let told = tell(seed, kind);
            let so_far = done.fetch_add(1, Ordering::Relaxed) + 1;
            if so_far.is_multiple_of(PROGRESS) {
                println!("{so_far} told after {:.0} s", begin.elapsed().as_secs_f64());
            }
            if told.broken.is_some() {
                // Told at once: the run may be ended from outside.
                note(&told, stories);
                if let Ok(mut all) = broken.lock() {
                    all.push(told);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    let (told, seconds) = (done.load(Ordering::Relaxed), begin.elapsed().as_secs_f64());
    let mut broken = broken.into_inner().unwrap_or_default();
    broken.sort_by_key(|told| told.story.len());
    if let [shortest, _, ..] = &broken[..] {
        println!("the shortest: {}", command(shortest));
    }
    let an_hour = told as f64 / seconds * 3600.0;
    println!("{told} stories in {seconds:.1} s ({an_hour:.0} an hour), {} broke a rule", broken.len());
    broken.is_empty() && told > 0
}

fn command(told: &Told) -> String {
    format!("mmm-sim tell --kind {:?} --seed {}", told.kind, told.seed)
}

/// What is broken, how to tell it again, and its story in the folder.
fn note(told: &Told, stories: Option<&Path>) {
    let what = told.broken.as_deref().unwrap_or_default();
    println!("{}\n    {}", what.lines().next().unwrap_or_default(), command(told));
    if let Some(folder) = stories {
        let file = folder.join(format!("{:?}-{}.txt", told.kind, told.seed));
        if let Err(e) = std::fs::write(&file, format!("{what}\n\n{}\n", told.story.join("\n"))) {
            println!("    its story could not be written to {}: {e}", file.display());
        }
    }
}

fn play(file: &Path) -> bool {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) => {
            println!("reading {}: {e}", file.display());
            return false;
        }
    };
    let played = mmm_tests::scenario::play(&text);
    if let Err(what) = &played.end {
        println!("{what}\n");
    }
    println!("{}", played.story.join("\n"));
    played.end.is_ok()
}
