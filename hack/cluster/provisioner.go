package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// A localProvisioner makes volumes that are folders on the node. It looks at
// all claims and volumes whenever one changes, which a test cluster affords.
type localProvisioner struct {
	client *apiClient
	folder string
	node   string
}

const (
	annotationProvisioner   = "volume.kubernetes.io/storage-provisioner"
	annotationSelectedNode  = "volume.kubernetes.io/selected-node"
	annotationProvisionedBy = "pv.kubernetes.io/provisioned-by"

	claimsPath  = "/api/v1/persistentvolumeclaims"
	volumesPath = "/api/v1/persistentvolumes"
)

type objectMeta struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace,omitempty"`
	UID               string            `json:"uid,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	DeletionTimestamp *time.Time        `json:"deletionTimestamp,omitempty"`
}

type storageAmount struct {
	Storage string `json:"storage,omitempty"`
}

type claim struct {
	Metadata objectMeta `json:"metadata"`
	Spec     struct {
		StorageClassName string   `json:"storageClassName"`
		VolumeName       string   `json:"volumeName"`
		AccessModes      []string `json:"accessModes"`
		VolumeMode       string   `json:"volumeMode"`
		Resources        struct {
			Requests storageAmount `json:"requests"`
		} `json:"resources"`
	} `json:"spec"`
	Status struct {
		Phase    string        `json:"phase"`
		Capacity storageAmount `json:"capacity"`
	} `json:"status"`
}

type volume struct {
	Metadata objectMeta `json:"metadata"`
	Spec     struct {
		ReclaimPolicy string        `json:"persistentVolumeReclaimPolicy"`
		Capacity      storageAmount `json:"capacity"`
		Local         *struct {
			Path string `json:"path"`
		} `json:"local"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

func (p *localProvisioner) run(ctx context.Context) {
	changed := make(chan struct{}, 1)
	signal := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	for _, path := range []string{claimsPath, volumesPath} {
		go func() {
			for ctx.Err() == nil {
				// However a watch ends, the next one starts over.
				_ = p.client.watch(ctx, path, signal)
				signal()
				time.Sleep(time.Second)
			}
		}()
	}
	var last string
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		if err := p.reconcile(ctx); err == nil {
			last = ""
		} else {
			// Before the API server is up, and while it is away, the same
			// error comes back every second.
			if err.Error() != last {
				fmt.Fprintln(os.Stderr, "volumes:", err)
				last = err.Error()
			}
			time.AfterFunc(time.Second, signal)
		}
	}
}

func (p *localProvisioner) reconcile(ctx context.Context) error {
	var claims struct{ Items []claim }
	var volumes struct{ Items []volume }
	if err := p.client.get(ctx, claimsPath, &claims); err != nil {
		return err
	}
	if err := p.client.get(ctx, volumesPath, &volumes); err != nil {
		return err
	}
	byName := map[string]volume{}
	var errs []error
	for _, v := range volumes.Items {
		byName[v.Metadata.Name] = v
		if v.Metadata.Annotations[annotationProvisionedBy] == provisioner {
			errs = append(errs, p.reclaim(ctx, v))
		}
	}
	for _, c := range claims.Items {
		if c.Metadata.Annotations[annotationProvisioner] != provisioner || c.Metadata.DeletionTimestamp != nil {
			continue
		}
		switch _, provisioned := byName["pvc-"+c.Metadata.UID]; {
		case c.Status.Phase == "Pending" && !provisioned && c.Metadata.Annotations[annotationSelectedNode] == p.node:
			errs = append(errs, p.provision(ctx, c))
		case c.Status.Phase == "Bound" && provisioned:
			errs = append(errs, p.resize(ctx, c, byName[c.Spec.VolumeName]))
		}
	}
	return errors.Join(errs...)
}

func (p *localProvisioner) provision(ctx context.Context, c claim) error {
	if c.Spec.VolumeMode == "Block" {
		return fmt.Errorf("claim %s/%s asks for a block device; volumes here are folders", c.Metadata.Namespace, c.Metadata.Name)
	}
	name := "pvc-" + c.Metadata.UID
	path := filepath.Join(p.folder, name)
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	// Pods of any user write here. With fsGroup the kubelet also gives the
	// folder to that group, as it would on a cloud's disk.
	if err := os.Chmod(path, 0o777); err != nil {
		return err
	}
	err := p.client.create(ctx, volumesPath, map[string]any{
		"apiVersion": "v1",
		"kind":       "PersistentVolume",
		"metadata": map[string]any{
			"name":        name,
			"annotations": map[string]string{annotationProvisionedBy: provisioner},
		},
		"spec": map[string]any{
			"capacity":                      c.Spec.Resources.Requests,
			"accessModes":                   c.Spec.AccessModes,
			"persistentVolumeReclaimPolicy": "Delete",
			"storageClassName":              c.Spec.StorageClassName,
			"volumeMode":                    "Filesystem",
			"local":                         map[string]string{"path": path},
			"claimRef": map[string]string{
				"apiVersion": "v1",
				"kind":       "PersistentVolumeClaim",
				"namespace":  c.Metadata.Namespace,
				"name":       c.Metadata.Name,
				"uid":        c.Metadata.UID,
			},
			"nodeAffinity": map[string]any{
				"required": map[string]any{
					"nodeSelectorTerms": []any{map[string]any{
						"matchExpressions": []any{map[string]any{
							"key": "kubernetes.io/hostname", "operator": "In", "values": []string{p.node},
						}},
					}},
				},
			},
		},
	})
	return ignore(err, http.StatusConflict)
}

// reclaim removes a volume whose claim is gone.
func (p *localProvisioner) reclaim(ctx context.Context, v volume) error {
	if v.Status.Phase != "Released" || v.Spec.ReclaimPolicy != "Delete" || v.Metadata.DeletionTimestamp != nil || v.Spec.Local == nil {
		return nil
	}
	if filepath.Dir(v.Spec.Local.Path) != p.folder {
		return fmt.Errorf("volume %s is not below %s: %s", v.Metadata.Name, p.folder, v.Spec.Local.Path)
	}
	if err := os.RemoveAll(v.Spec.Local.Path); err != nil {
		return err
	}
	return ignore(p.client.delete(ctx, volumesPath+"/"+v.Metadata.Name), http.StatusNotFound)
}

// resize grants what a claim asks for: a folder has no size. Both amounts are
// normalised by the API server, so comparing the text is enough.
func (p *localProvisioner) resize(ctx context.Context, c claim, v volume) error {
	wanted := c.Spec.Resources.Requests
	if wanted == c.Status.Capacity {
		return nil
	}
	if v.Spec.Capacity != wanted {
		err := p.client.patch(ctx, volumesPath+"/"+v.Metadata.Name, map[string]any{"spec": map[string]any{"capacity": wanted}})
		if err != nil {
			return ignore(err, http.StatusNotFound)
		}
	}
	path := fmt.Sprintf("/api/v1/namespaces/%s/persistentvolumeclaims/%s/status", c.Metadata.Namespace, c.Metadata.Name)
	return ignore(p.client.patch(ctx, path, map[string]any{"status": map[string]any{"capacity": wanted}}), http.StatusNotFound)
}

// ignore drops the API server's answer that somebody else was faster.
func ignore(err error, code int) error {
	var refused *apiError
	if errors.As(err, &refused) && refused.code == code {
		return nil
	}
	return err
}
