# Both processes in one image: /manager is the operator, /shardserver the shard server.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=unknown
ENV CGO_ENABLED=0 GOFLAGS=-buildvcs=false
RUN go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/manager . && \
    go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/shardserver ./shardserver

FROM gcr.io/distroless/static:nonroot
COPY --from=build /out/manager /out/shardserver /
USER 65532:65532
ENTRYPOINT ["/manager"]
