//! "Did you mean": the known word nearest to one that is not known.

/// The nearest of `known`, if it is near enough to be meant: one slip for every three letters, at least one.
pub(super) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let most = (word.chars().count() / 3).max(1);
    known.into_iter().map(|k| (distance(word, k), k)).filter(|(d, _)| *d <= most).min().map(|(_, k)| k)
}

/// "did you mean 'x'?", or else what is known.
pub(super) fn hint<'a>(word: &str, words: impl IntoIterator<Item = &'a str> + Clone) -> String {
    match nearest(word, words.clone()) {
        Some(near) => format!("did you mean '{near}'?"),
        None => known(words),
    }
}

/// What is known. For names that the operator has given: those are often near each other (db1, db2), so the nearest
/// would be a guess.
pub(super) fn known<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let words: Vec<&str> = words.into_iter().collect();
    if words.is_empty() { "there are none yet".to_owned() } else { format!("known are {}", words.join(", ")) }
}

/// How many letters have to be added, left out, changed or swapped with their neighbour, whatever their case.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.to_lowercase().chars().take(64).collect();
    let b: Vec<char> = b.to_lowercase().chars().take(64).collect();
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = changed.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slip_of_each_kind_is_distance_one() {
        for slip in ["trap_perod", "trap_periood", "trap_peryod", "trap_peroid", "Trap_perod"] {
            assert_eq!(distance(slip, "trap_period"), 1, "{slip}");
        }
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
    }

    #[test]
    fn what_is_far_away_is_not_suggested() {
        assert_eq!(nearest("trap_perod", ["check_period", "trap_period"]), Some("trap_period"));
        assert_eq!(nearest("colour", ["check_period", "trap_period"]), None);
        assert_eq!(nearest("ix", ["ip", "peer"]), Some("ip"));
        assert_eq!(hint("colour", ["ip", "peer"]), "known are ip, peer");
        assert_eq!(hint("colour", []), "there are none yet");
    }
}
