//! One client, many calls.

use super::*;

#[tokio::test]
async fn one_connection_serves_call_after_call() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for _ in 0..20 {
            read_request(&mut stream);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n200").unwrap();
        }
    });
    let client = client(&url);
    for _ in 0..20 {
        let reply = update(&client, UpdateState::Running).await.unwrap();
        assert_eq!(reply, UpdateReply::Accepted { job_status: None });
    }
    server.join().unwrap();
}
