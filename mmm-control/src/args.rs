//! The command line: MMM's verbs, and what each one asks of the monitor.
//!
//! Wrong usage is a wrong shape: an unknown verb or option, too few or too many words. It exits 2 and shows how it is
//! meant. A wrong value (an unknown check, an address that is none) is an `ERROR:` answer like those of the monitor,
//! so that scripts need to look in one place only. Nothing here talks to anybody.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use mmm_common::control::Command;
use mmm_common::ids::{HostName, RoleName};
use mmm_common::state::CheckKind;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the monitor's configuration lies when nothing else is said.
pub(crate) const DEFAULT_CONFIG: &str = "/etc/mysql-mmm/mmm_mon.toml";

/// MMM's own list, with what is new. One golden test holds it, another that no verb is missing.
const HELP: &str = "\
Usage: mmm_control [@CLUSTER] [OPTIONS] <COMMAND>

Valid commands are:
    help                              - show this message
    ping                              - ping monitor
    show                              - show status
    checks [<host>|all [<check>|all]] - show checks status
    set_online [--accept-lost] <host> - set host <host> online
                                        (--accept-lost: discard what only this host has, after saving it)
    set_offline <host>                - set host <host> offline
    mode                              - print current mode
    set_active                        - switch into active mode
    set_manual                        - switch into manual mode
    set_passive                       - switch into passive mode
    move_role [--force] <role> <host> - move exclusive role <role> to host <host>
                                        (Only use --force if you know what you are doing!)
    set_ip <ip> <host>                - set role with ip <ip> to host <host>
                                        (Only in passive mode)
    confirm_dead <host>               - your word that host <host> is switched off and stays so:
                                        others may take over its roles without waiting for it
    lost <host>                       - what only host <host> has, or had: how many transactions, and where they are saved
    reclone <host> --from <host>      - throw the data of a host away and copy those of another
    doctor                            - examine every prerequisite on every host; what is wrong, and the cure
                                        (exits with 1 when there is an error)

Options:
    @CLUSTER                          - first word only: read mmm_mon_CLUSTER.toml beside the default configuration
    -c, --config <FILE>               - the monitor's configuration (default: /etc/mysql-mmm/mmm_mon.toml)
    --json                            - answer with one JSON document
    --timeout <SECONDS>               - how long to wait for the answer (default: 10, doctor: 30, move_role: 90)
    -h, --help                        - show this message
    -V, --version                     - show the version

Exit codes: 0 done, 1 an ERROR: answer, 2 wrong usage or configuration, 3 no monitor or no answer from it
";

/// What was asked for, once the words have the right shape.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) config: PathBuf,
    pub(crate) timeout: Option<Duration>,
    /// Err: a value that cannot be meant, in the words after `ERROR: `.
    pub(crate) command: Result<Command, String>,
}

/// Why there is nothing to ask the monitor.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Instead {
    Help(String),
    Version(String),
    WrongUsage(String),
}

#[derive(Parser)]
#[command(name = "mmm_control", version, override_help = HELP, disable_help_subcommand = true)]
struct Line {
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[arg(long, global = true)]
    json: bool,
    #[arg(long, global = true, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: Option<u64>,
    #[command(subcommand)]
    verb: Verb,
}

/// What each one means stands in `HELP`.
#[derive(Subcommand)]
#[command(rename_all = "snake_case")]
enum Verb {
    Help,
    Ping,
    Show,
    Checks {
        #[arg(default_value = "all")]
        host: String,
        #[arg(default_value = "all")]
        check: String,
    },
    Mode,
    SetActive,
    SetManual,
    SetPassive,
    SetOnline {
        #[arg(long = "accept-lost")]
        accept_lost: bool,
        host: String,
    },
    SetOffline {
        host: String,
    },
    MoveRole {
        #[arg(long)]
        force: bool,
        role: String,
        host: String,
    },
    SetIp {
        ip: String,
        host: String,
    },
    ConfirmDead {
        host: String,
    },
    Lost {
        host: String,
    },
    Reclone {
        host: String,
        #[arg(long, value_name = "HOST")]
        from: String,
    },
    Doctor,
}

/// Reads the words after the program's name. `json` is found even when the rest is wrong, because the complaint has
/// to be JSON as well then.
pub(crate) fn read(words: Vec<OsString>) -> (bool, Result<Asked, Instead>) {
    let json = words.iter().any(|w| w == "--json");
    (json, read_line(words))
}

fn read_line(mut words: Vec<OsString>) -> Result<Asked, Instead> {
    let cluster = match words.first().and_then(|w| w.to_str()).and_then(|w| w.strip_prefix('@')) {
        Some(name) => Some(cluster_name(name)?),
        None => None,
    };
    if cluster.is_some() {
        words.remove(0);
    }
    let line = Line::command()
        .no_binary_name(true)
        .try_get_matches_from(words)
        .and_then(|matches| Line::from_arg_matches(&matches))
        .map_err(|e| instead(&e))?;
    let config = match (cluster, line.config) {
        (Some(_), Some(_)) => {
            return Err(wrong_usage("@CLUSTER and --config name two configurations; give one of them"));
        }
        (Some(cluster), None) => Path::new(DEFAULT_CONFIG).with_file_name(format!("mmm_mon_{cluster}.toml")),
        (None, Some(file)) => file,
        (None, None) => PathBuf::from(DEFAULT_CONFIG),
    };
    let timeout = line.timeout.map(Duration::from_secs);
    match command(line.verb) {
        Some(command) => Ok(Asked { config, timeout, command }),
        None => Err(Instead::Help(HELP.to_owned())),
    }
}

/// None: nothing for the monitor to answer.
fn command(verb: Verb) -> Option<Result<Command, String>> {
    Some(Ok(match verb {
        Verb::Help => return None,
        Verb::Ping => Command::Ping,
        Verb::Show => Command::Show,
        Verb::Checks { host, check } => match check_kind(&check) {
            Ok(check) => Command::Checks { host: (host != "all").then_some(HostName(host)), check },
            Err(why) => return Some(Err(why)),
        },
        Verb::Mode => Command::Mode,
        Verb::SetActive => Command::SetActive,
        Verb::SetManual => Command::SetManual,
        Verb::SetPassive => Command::SetPassive,
        Verb::SetOnline { accept_lost, host } => Command::SetOnline { host: HostName(host), accept_lost },
        Verb::SetOffline { host } => Command::SetOffline { host: HostName(host) },
        Verb::MoveRole { force, role, host } => Command::MoveRole { role: RoleName(role), host: HostName(host), force },
        Verb::SetIp { ip, host } => match ip.parse() {
            Ok(ip) => Command::SetIp { ip, host: HostName(host) },
            Err(_) => return Some(Err(format!("'{ip}' is not an IP address!"))),
        },
        Verb::ConfirmDead { host } => Command::ConfirmDead { host: HostName(host) },
        Verb::Lost { host } => Command::Lost { host: HostName(host) },
        Verb::Reclone { host, from } => Command::Reclone { host: HostName(host), from: HostName(from) },
        Verb::Doctor => Command::Doctor,
    }))
}

fn check_kind(word: &str) -> Result<Option<CheckKind>, String> {
    if word == "all" {
        return Ok(None);
    }
    word.parse().map(Some).map_err(|_| {
        let known: Vec<&str> = CheckKind::ALL.iter().map(|k| k.as_str()).collect();
        format!("Unknown check '{word}'! Known checks: {}.", known.join(", "))
    })
}

/// A name, not a path: it must not lead out of the configuration's folder.
fn cluster_name(name: &str) -> Result<String, Instead> {
    let good = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if good {
        Ok(name.to_owned())
    } else {
        Err(wrong_usage(&format!("'@{name}' is no cluster's name: letters, digits, '_' and '-' after the '@'")))
    }
}

fn wrong_usage(what: &str) -> Instead {
    Instead::WrongUsage(format!("error: {what}\n\n{HELP}"))
}

fn instead(e: &clap::Error) -> Instead {
    use clap::error::ErrorKind;
    // ErrorKind is clap's and grows; everything that is neither help nor version is a mistake.
    if e.kind() == ErrorKind::DisplayVersion {
        return Instead::Version(e.to_string());
    }
    if e.kind() == ErrorKind::DisplayHelp {
        return Instead::Help(HELP.to_owned());
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand || e.kind() == ErrorKind::MissingSubcommand {
        return wrong_usage("no command was given");
    }
    let text = e.to_string();
    let first = text.lines().take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more information"));
    let said = first.collect::<Vec<_>>().join("\n");
    wrong_usage(said.trim().trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &str) -> Result<Asked, Instead> {
        read(words.split_whitespace().map(OsString::from).collect()).1
    }

    fn asked(words: &str) -> Asked {
        check(words).unwrap_or_else(|e| panic!("{words}: {e:?}"))
    }

    #[test]
    fn a_cluster_is_read_beside_the_default() {
        assert_eq!(asked("show").config, Path::new(DEFAULT_CONFIG));
        assert_eq!(asked("@C1 show").config, Path::new("/etc/mysql-mmm/mmm_mon_C1.toml"));
        assert_eq!(asked("show -c /tmp/x.toml").config, Path::new("/tmp/x.toml"));
        for wrong in ["@ show", "@../../tmp/x show", "@C1 -c /tmp/x.toml show", "show @C1"] {
            assert!(matches!(check(wrong), Err(Instead::WrongUsage(_))), "{wrong}");
        }
    }

    #[test]
    fn all_means_every_host_and_every_check() {
        let every = Ok(Command::Checks { host: None, check: None });
        for words in ["checks", "checks all", "checks all all"] {
            assert_eq!(asked(words).command, every, "{words}");
        }
        let one = Command::Checks { host: Some("db1".into()), check: Some(CheckKind::RepBacklog) };
        assert_eq!(asked("checks db1 rep_backlog").command, Ok(one));
        assert!(asked("checks db1 pong").command.unwrap_err().starts_with("Unknown check 'pong'!"));
    }

    #[test]
    fn force_may_stand_before_or_after() {
        let wanted = Command::MoveRole { role: "writer".into(), host: "db2".into(), force: true };
        for words in ["move_role --force writer db2", "move_role writer db2 --force"] {
            assert_eq!(asked(words).command, Ok(wanted.clone()), "{words}");
        }
    }

    #[test]
    fn a_command_is_logged_as_it_was_typed() {
        for words in [
            "ping",
            "show",
            "checks all all",
            "checks db1 rep_threads",
            "mode",
            "set_active",
            "set_manual",
            "set_passive",
            "set_online db1",
            "set_offline db1",
            "move_role writer db2",
            "move_role --force writer db2",
            "set_ip 192.168.0.50 db1",
            "confirm_dead db1",
        ] {
            assert_eq!(asked(words).command.map(|c| c.to_string()), Ok(words.to_owned()));
        }
    }

    #[test]
    fn json_is_noticed_even_in_a_wrong_line() {
        let (json, result) = read(vec!["--json".into(), "shwo".into()]);
        assert!(json && matches!(result, Err(Instead::WrongUsage(_))));
    }

    #[test]
    fn every_verb_is_in_the_help() {
        for verb in Line::command().get_subcommands() {
            assert!(HELP.contains(&format!("\n    {}", verb.get_name())), "{} is missing", verb.get_name());
        }
    }
}
