//! The command line's side of the control interface: one connection, one
//! request after the other. Turns HTTP errors back into `ApiError` and tells a
//! missing daemon from a refused request.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use axum::http::{Method, Request, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;
use vtep_common::Vni;

use super::command::{ApiError, ErrorKind};
use super::types::{
    ErrorBody, FdbFilter, FdbRow, FdbSpec, PortSpec, PortStatus, RemoteRow, ResyncReport, Stats,
    Status, VniRow, VniSpec, WriteMode,
};
use super::values::{IfName, StationMac};
use crate::instance::{Instance, reason};

/// Longer than the daemon gives itself for a command.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no daemon for instance {instance} ({}: {}): start it with `{}`",
        path.display(), reason(source), run_command(instance)
    )]
    NoDaemon {
        instance: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot use {}: {}: run the command as root", path.display(), reason(source))]
    NoAccess { path: PathBuf, source: io::Error },
    #[error(
        "the daemon of instance {0} does not answer: see its log, or end it and start it again"
    )]
    Timeout(String),
    #[error(transparent)]
    Refused(#[from] ApiError),
    #[error("the daemon closed the connection ({0}): see its log")]
    Http(#[from] hyper::Error),
    #[error("the daemon's answer is not understood ({0}): are both of one version?")]
    Json(#[from] serde_json::Error),
}

fn run_command(instance: &str) -> String {
    if instance == Instance::DEFAULT {
        "vtep run".to_owned()
    } else {
        format!("vtep --instance {instance} run")
    }
}

/// A connection to the daemon of one instance.
#[derive(Debug)]
pub struct Client {
    instance: String,
    requests: SendRequest<Full<Bytes>>,
}

impl Client {
    /// `NoDaemon` when nobody listens, `NoAccess` without permission.
    pub async fn connect(instance: &Instance) -> Result<Self, ClientError> {
        let path = instance.socket_path();
        let stream = match UnixStream::connect(&path).await {
            Ok(stream) => stream,
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(ClientError::NoAccess { path, source });
            }
            Err(source) => {
                let instance = instance.name().to_owned();
                return Err(ClientError::NoDaemon {
                    instance,
                    path,
                    source,
                });
            }
        };
        let (requests, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its errors come out at the request as well.
        tokio::spawn(connection);
        Ok(Self {
            instance: instance.name().to_owned(),
            requests,
        })
    }

    pub async fn status(&mut self) -> Result<Status, ClientError> {
        self.get("/v1/status").await
    }

    pub async fn vni_show(&mut self) -> Result<Vec<VniRow>, ClientError> {
        self.get("/v1/vnis").await
    }

    pub async fn vni_add(&mut self, spec: &VniSpec) -> Result<(), ClientError> {
        self.write(Method::POST, "/v1/vnis", Some(spec)).await
    }

    pub async fn vni_del(&mut self, vni: Vni) -> Result<(), ClientError> {
        self.delete(&format!("/v1/vnis/{vni}")).await
    }

    pub async fn port_show(&mut self) -> Result<Vec<PortStatus>, ClientError> {
        self.get("/v1/ports").await
    }

    pub async fn port_add(&mut self, spec: &PortSpec) -> Result<(), ClientError> {
        self.write(Method::POST, "/v1/ports", Some(spec)).await
    }

    pub async fn port_del(&mut self, name: &IfName) -> Result<(), ClientError> {
        self.delete(&format!("/v1/ports/{}", path_segment(name.as_str())))
            .await
    }

    pub async fn fdb_show(&mut self, filter: FdbFilter) -> Result<Vec<FdbRow>, ClientError> {
        let mut path = String::from("/v1/fdb");
        let mut mark = '?';
        if let Some(vni) = filter.vni {
            path += &format!("{mark}vni={vni}");
            mark = '&';
        }
        if let Some(mac) = filter.mac {
            path += &format!("{mark}mac={mac}");
        }
        self.get(&path).await
    }

    pub async fn fdb_write(&mut self, spec: &FdbSpec, mode: WriteMode) -> Result<(), ClientError> {
        let method = match mode {
            WriteMode::Add => Method::POST,
            WriteMode::Replace => Method::PUT,
        };
        self.write(method, "/v1/fdb", Some(spec)).await
    }

    pub async fn fdb_del(&mut self, vni: Vni, mac: StationMac) -> Result<(), ClientError> {
        self.delete(&format!("/v1/fdb/{vni}/{mac}")).await
    }

    pub async fn remote_show(&mut self) -> Result<Vec<RemoteRow>, ClientError> {
        self.get("/v1/remotes").await
    }

    pub async fn stats(&mut self) -> Result<Stats, ClientError> {
        self.get("/v1/stats").await
    }

    pub async fn resync(&mut self) -> Result<ResyncReport, ClientError> {
        self.request(Method::POST, "/v1/resync", Bytes::new()).await
    }

    pub async fn unload(&mut self) -> Result<(), ClientError> {
        self.write(Method::POST, "/v1/unload", None::<&()>).await
    }

    async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    async fn delete(&mut self, path: &str) -> Result<(), ClientError> {
        self.write(Method::DELETE, path, None::<&()>).await
    }

    async fn write(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(), ClientError> {
        let body = match body {
            Some(body) => Bytes::from(serde_json::to_vec(body)?),
            None => Bytes::new(),
        };
        self.request(method, path, body).await
    }

    /// Any request; an empty answer (204) reads as JSON `null`.
    async fn request<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path
            .parse()
            .map_err(|_| ApiError::bad_request(format!("`{path}` cannot be part of a request")))?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, header::HeaderValue::from_static("vtep"));
        headers.insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static("application/json"),
        );
        let (status, bytes) = match timeout(TIMEOUT, self.exchange(request)).await {
            Ok(answer) => answer?,
            Err(_) => return Err(ClientError::Timeout(self.instance.clone())),
        };
        if status == StatusCode::NO_CONTENT {
            Ok(serde_json::from_slice(b"null")?)
        } else if status.is_success() {
            Ok(serde_json::from_slice(&bytes)?)
        } else {
            let body: ErrorBody = serde_json::from_slice(&bytes)?;
            Err(ApiError::new(ErrorKind::from_http_status(status.as_u16()), body.error).into())
        }
    }

    async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), hyper::Error> {
        self.requests.ready().await?;
        let response = self.requests.send_request(request).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

/// Percent-encoding of everything but unreserved characters (RFC 3986 section 2).
fn path_segment(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}
