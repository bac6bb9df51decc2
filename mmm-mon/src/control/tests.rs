//! The control port against clients that behave, and that do not.

use super::*;
use crate::feed::{Inbox, feed};
use mmm_common::config::{Cluster, Monitor as Config};
use mmm_common::control::Command;
use std::collections::BTreeMap;
use std::time::Instant;
use tokio::sync::watch;

/// A port with a loop behind it that answers `ping` at once and nothing else ever.
struct Port {
    at: SocketAddr,
    feed: Feed,
    _inbox: tokio::task::JoinHandle<Vec<oneshot::Sender<Answer>>>,
}

async fn port() -> Port {
    let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let at = listener.local_addr().unwrap();
    let (feed, inbox) = feed();
    let config = Config::of(Cluster::of(BTreeMap::new(), BTreeMap::new()));
    let (_, config) = watch::channel(Arc::new(config));
    tokio::spawn(serve(listener, feed.clone(), Doctor::new(config, 1)));
    Port { at, feed, _inbox: tokio::spawn(answer_pings(inbox)) }
}

async fn answer_pings(mut inbox: Inbox) -> Vec<oneshot::Sender<Answer>> {
    let mut unanswered = Vec::new();
    while let Some(event) = inbox.next().await {
        let Event::Command { command, who, reply } = event else { panic!("{event:?}") };
        if command == Command::Ping {
            assert!(who.starts_with("127.0.0.1:"), "{who}");
            reply.send(Answer::Done { text: "Pinged successfully!".into() }).unwrap();
        } else {
            unanswered.push(reply);
        }
    }
    unanswered
}

async fn connect(port: &Port) -> TcpStream {
    TcpStream::connect(port.at).await.unwrap()
}

async fn rest(mut stream: TcpStream) -> String {
    let mut text = String::new();
    timeout(Duration::from_secs(6), stream.read_to_string(&mut text)).await.expect("the port closes").unwrap();
    text
}

async fn say(port: &Port, bytes: &[u8]) -> String {
    let mut stream = connect(port).await;
    stream.write_all(bytes).await.unwrap();
    rest(stream).await
}

fn request(command: Command) -> String {
    to_line(&Request { protocol: PROTOCOL, command }).unwrap()
}

async fn ping_is_answered(port: &Port) {
    let began = Instant::now();
    let answer = say(port, request(Command::Ping).as_bytes()).await;
    assert_eq!(answer, "{\"answer\":\"done\",\"text\":\"Pinged successfully!\"}\n");
    assert!(began.elapsed() < Duration::from_millis(200), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_request_is_answered_by_one_line() {
    ping_is_answered(&port().await).await;
}

#[tokio::test]
async fn doctor_is_answered_beside_the_core() {
    let port = port().await;
    let answer = say(&port, request(Command::Doctor).as_bytes()).await;
    assert!(answer.starts_with(r#"{"answer":"doctor","findings":[{"host":null,"subject":"kill_host""#), "{answer}");
}

#[tokio::test]
async fn a_client_that_closes_its_side_after_asking_is_answered() {
    let port = port().await;
    let mut stream = connect(&port).await;
    stream.write_all(request(Command::Ping).as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(rest(stream).await.contains("Pinged"));
}

#[tokio::test]
async fn what_is_no_request_is_refused_in_words() {
    let port = port().await;
    for (sent, word) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "is no request"),
        (b"{\"protocol\":3,\"command\":{\"verb\":\"explode\"}}\n", "unknown variant `explode`"),
        (b"{\"protocol\":99,\"something\":\"else\"}\n", "protocol 99, this mmm_mond 3"),
        (b"\xff\xfe\n", "not UTF-8"),
    ] {
        let answer = say(&port, sent).await;
        assert!(answer.starts_with("{\"answer\":\"refused\"") && answer.contains(word), "{answer}");
        assert!(answer.ends_with('\n'));
    }
    ping_is_answered(&port).await;
    assert_eq!(port.feed.refusals(), 4, "each is counted, and the ping is not");
}

#[tokio::test]
async fn a_line_without_an_end_is_refused_and_the_refusal_arrives() {
    let port = port().await;
    let answer = say(&port, &vec![b'x'; 4 * MAX_REQUEST]).await;
    assert!(answer.contains("line longer than 65536 bytes"), "{answer}");
}

#[tokio::test]
async fn a_slow_sender_is_cut_off_after_two_seconds() {
    let port = port().await;
    let stream = connect(&port).await;
    let (mut read, mut write) = stream.into_split();
    let began = Instant::now();
    tokio::spawn(async move {
        while write.write_all(b" ").await.is_ok() {
            sleep(Duration::from_millis(50)).await
        }
    });
    let mut text = String::new();
    let _ = timeout(Duration::from_secs(5), read.read_to_string(&mut text)).await;
    assert!(text.contains("No request came within 2s"), "{text}");
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
}

// lessons.md 11
#[tokio::test]
async fn a_hundred_silent_visitors_hold_up_nobody() {
    let port = port().await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(connect(&port).await);
    }
    ping_is_answered(&port).await;
    let first = silent.remove(0);
    assert_eq!(rest(first).await, "", "the one silent for longest has made room");
}

#[tokio::test]
async fn when_all_places_wait_for_an_answer_the_next_is_told_so() {
    let port = port().await;
    let mut waiting = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = connect(&port).await;
        stream.write_all(request(Command::Show).as_bytes()).await.unwrap();
        waiting.push(stream);
    }
    let all_read = async {
        loop {
            let answer = say(&port, request(Command::Ping).as_bytes()).await;
            if answer.contains("Try again later") {
                return answer;
            }
        }
    };
    let answer = timeout(Duration::from_secs(5), all_read).await.unwrap();
    assert!(answer.contains("64 requests wait"), "{answer}");
}
